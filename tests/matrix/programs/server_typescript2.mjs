// The matrix's server on the TypeScript SDK 2.x: both eras, with sessions for the older one.
// Prints its port; every tool that runs leaves a line in the ledger.

import { randomUUID } from 'node:crypto';
import { appendFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const require = createRequire(join(process.env.PACKAGES, 'here.cjs'));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { McpServer, createMcpHandler, isLegacyRequest } = await load('@modelcontextprotocol/server');
const { NodeStreamableHTTPServerTransport, toNodeHandler, toWebRequest } = await load('@modelcontextprotocol/node');
const { createMcpExpressApp } = await load('@modelcontextprotocol/express');
const { z } = await load('zod');

const enter = (tool, given = {}) =>
  appendFileSync(process.env.LEDGER, `${JSON.stringify({ tool, arguments: given })}\n`);
const text = (said) => ({ content: [{ type: 'text', text: said }] });

function matrix() {
  const server = new McpServer({ name: 'matrix', version: '1' });
  server.registerTool('add', { inputSchema: z.object({ a: z.number(), b: z.number() }) }, ({ a, b }) => {
    enter('add', { a, b });
    return text(String(a + b));
  });
  server.registerTool('drop', { inputSchema: z.object({ table: z.string() }) }, ({ table }) => {
    enter('drop', { table });
    return text(`dropped ${table}`);
  });
  server.registerTool('paced', { inputSchema: z.object({}) }, () => {
    enter('paced');
    return text('once');
  });
  for (const name of ['mark', 'mark ']) {
    server.registerTool(name, { inputSchema: z.object({ text: z.string() }) }, (given) => {
      enter(name, { text: given.text });
      return text('marked');
    });
  }
  const report = async ({ mcpReq }, progress, total, message) => {
    const token = mcpReq._meta?.progressToken;
    if (token === undefined) return;
    const params = { progressToken: token, progress, total, message };
    await mcpReq.notify({ method: 'notifications/progress', params });
  };
  server.registerTool('count', { inputSchema: z.object({ to: z.number() }) }, async ({ to }, context) => {
    enter('count', { to });
    for (let step = 0; step < to; step += 1) await report(context, step, to, `step ${step}`);
    return text('done');
  });
  server.registerTool('wait', { inputSchema: z.object({}) }, async (_, context) => {
    enter('wait');
    await report(context, 0, 1, 'waiting');
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 20_000);
      context.mcpReq.signal.addEventListener('abort', () => {
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
const modern = toNodeHandler(createMcpHandler(matrix, { legacy: 'reject' }));
const app = createMcpExpressApp();
app.all('/mcp', async (request, response) => {
  if (!(await isLegacyRequest(await toWebRequest(request, request.body), request.body))) {
    await modern(request, response, request.body);
    return;
  }
  let transport = sessions.get(request.headers['mcp-session-id']);
  if (transport === undefined) {
    if (request.body?.method !== 'initialize') {
      response.status(request.headers['mcp-session-id'] === undefined ? 400 : 404).json({
        jsonrpc: '2.0', error: { code: -32000, message: 'no such session' }, id: null,
      });
      return;
    }
    transport = new NodeStreamableHTTPServerTransport({
      sessionIdGenerator: () => randomUUID(),
      onsessioninitialized: (id) => sessions.set(id, transport),
      onsessionclosed: (id) => sessions.delete(id),
    });
    await matrix().connect(transport);
  }
  await transport.handleRequest(request, response, request.body);
});
const listener = app.listen(0, '127.0.0.1', () => console.log(listener.address().port));
