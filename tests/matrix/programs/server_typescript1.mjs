// The matrix's server on the TypeScript SDK 1.x. Prints its port; every tool that runs leaves a line in the ledger.

import { randomUUID } from 'node:crypto';
import { appendFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const require = createRequire(join(process.env.PACKAGES, 'here.cjs'));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { McpServer } = await load('@modelcontextprotocol/sdk/server/mcp.js');
const { StreamableHTTPServerTransport } = await load('@modelcontextprotocol/sdk/server/streamableHttp.js');
const { createMcpExpressApp } = await load('@modelcontextprotocol/sdk/server/express.js');
const { isInitializeRequest } = await load('@modelcontextprotocol/sdk/types.js');
const { z } = await load('zod');

const enter = (tool, given = {}) =>
  appendFileSync(process.env.LEDGER, `${JSON.stringify({ tool, arguments: given })}\n`);
const text = (said) => ({ content: [{ type: 'text', text: said }] });

function matrix() {
  const server = new McpServer({ name: 'matrix', version: '1' });
  server.registerTool('add', { inputSchema: { a: z.number(), b: z.number() } }, ({ a, b }) => {
    enter('add', { a, b });
    return text(String(a + b));
  });
  server.registerTool('drop', { inputSchema: { table: z.string() } }, ({ table }) => {
    enter('drop', { table });
    return text(`dropped ${table}`);
  });
  server.registerTool('paced', { inputSchema: {} }, () => {
    enter('paced');
    return text('once');
  });
  for (const name of ['mark', 'mark ']) {
    server.registerTool(name, { inputSchema: { text: z.string() } }, (given) => {
      enter(name, { text: given.text });
      return text('marked');
    });
  }
  const report = async ({ _meta, sendNotification }, progress, total, message) => {
    if (_meta?.progressToken === undefined) return;
    const params = { progressToken: _meta.progressToken, progress, total, message };
    await sendNotification({ method: 'notifications/progress', params });
  };
  server.registerTool('count', { inputSchema: { to: z.number() } }, async ({ to }, extra) => {
    enter('count', { to });
    for (let step = 0; step < to; step += 1) await report(extra, step, to, `step ${step}`);
    return text('done');
  });
  server.registerTool('wait', { inputSchema: {} }, async (_, extra) => {
    enter('wait');
    await report(extra, 0, 1, 'waiting');
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 20_000);
      extra.signal.addEventListener('abort', () => {
        enter('cancelled');
        clearTimeout(timer);
        resolve();
      });
    });
    return text('waited');
  });
  return server;
}

const sessions = new Map();
const app = createMcpExpressApp();
app.all('/mcp', async (request, response) => {
  let transport = sessions.get(request.headers['mcp-session-id']);
  if (transport === undefined) {
    if (!isInitializeRequest(request.body)) {
      response.status(request.headers['mcp-session-id'] === undefined ? 400 : 404).json({
        jsonrpc: '2.0', error: { code: -32000, message: 'no such session' }, id: null,
      });
      return;
    }
    transport = new StreamableHTTPServerTransport({
      sessionIdGenerator: () => randomUUID(),
      onsessioninitialized: (id) => sessions.set(id, transport),
      onsessionclosed: (id) => sessions.delete(id),
    });
    await matrix().connect(transport);
  }
  await transport.handleRequest(request, response, request.body);
});
const listener = app.listen(0, '127.0.0.1', () => console.log(listener.address().port));
