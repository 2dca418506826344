// The steps of both TypeScript clients: every one is gone through, whatever the one before came to.

const PATIENCE_MS = 10_000;

async function step(name, act) {
  let timer;
  const late = new Promise((resolve) => {
    timer = setTimeout(() => resolve({ outcome: 'hang' }), PATIENCE_MS);
  });
  let result;
  try {
    result = await Promise.race([act(), late]);
  } catch (error) {
    const code = error.code;
    result = Number.isInteger(code) && !/HTTP/.test(error.constructor.name)
      ? { outcome: 'error', code, text: error.message }
      : { outcome: 'exception', text: `${error.constructor.name}: ${error.message}` };
  }
  clearTimeout(timer);
  console.log(JSON.stringify({ ...result, step: name }));
}

export async function walk({ client, connect, call }) {
  const calling = (name, given, options) => async () => {
    const result = await call({ name, arguments: given }, options);
    return { outcome: 'result', is_error: Boolean(result.isError), text: result.content[0]?.text };
  };
  const list = async () => ({ outcome: 'result', names: (await client.listTools()).tools.map((tool) => tool.name) });
  const add = calling('add', { a: 1, b: 2 });

  await step('connect', async () => ({ outcome: 'result', text: await connect() }));
  await step('list', list);
  await step('call', add);
  await step('stream', async () => {
    const progress = [];
    const result = await calling('count', { to: 3 }, { onprogress: ({ message }) => progress.push(message) })();
    return { ...result, progress };
  });
  await step('cancel', async () => {
    const abort = new AbortController();
    const options = { signal: abort.signal, onprogress: () => abort.abort('enough') };
    try {
      return await calling('wait', {}, options)();
    } catch (error) {
      if (abort.signal.aborted) return { outcome: 'cancelled' };
      throw error;
    }
  });
  await step('call after cancel', add);
  await step('denied', calling('drop', { table: 't' }));
  await step('call after denial', add);
  await step('within limit', calling('paced', {}));
  await step('limited', calling('paced', {}));
  await step('call after limit', add);
  await step('list again', list);
  await step('close', async () => {
    await client.close();
    return { outcome: 'result' };
  });
  process.exit(0);
}
