// The reference server of the conformance runs, on the official TypeScript SDK: what it offers stands in everything.json.
// Both eras on /mcp of 127.0.0.1: sessions with resumable streams up to 2025-11-25, stateless from 2026-07-28.
// Argument: the port. Sources: the suite's "Server Implementation Requirements", the SDK's type declarations.

import { randomBytes, randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { setTimeout as pause } from 'node:timers/promises';

import { localhostHostValidation, NodeStreamableHTTPServerTransport, toNodeHandler } from '@modelcontextprotocol/node';
import {
  CLIENT_CAPABILITIES_META_KEY, classifyInboundRequest, createMcpHandler, createRequestStateCodec, fromJsonSchema,
  isInitializeRequest, McpServer, ProtocolError, ResourceNotFoundError,
} from '@modelcontextprotocol/server';

const OFFER = JSON.parse(readFileSync(new URL('everything.json', import.meta.url), 'utf8'));
const CAPABILITY = { 'elicitation/create': 'elicitation', 'sampling/createMessage': 'sampling', 'roots/list': 'roots' };
const STEP_MS = 50; // between notifications, so that a buffered stream would be seen
const RETRY_MS = 200; // after which a client comes back for a stream that was ended

const states = createRequestStateCodec({ key: randomBytes(32) });
const text = (words) => ({ content: [{ type: 'text', text: words }] });

/** A copy of `value` with every `{argument}` in its strings replaced. */
function filled(value, args) {
  const replace = (_, name) => JSON.stringify(String(args[name])).slice(1, -1);
  const names = Object.keys(args ?? {}).join('|');
  return names ? JSON.parse(JSON.stringify(value).replace(new RegExp(`\\{(${names})\\}`, 'g'), replace)) : value;
}

const isAnswer = (request, response) =>
  response !== undefined && (request.method !== 'elicitation/create' || response.content !== undefined);

/** What is still to be asked in the round the client is at, or undefined when every round is answered. */
async function missing(item, { mcpReq }) {
  const responses = mcpReq.inputResponses ?? {};
  const declared = mcpReq.envelope?.[CLIENT_CAPABILITIES_META_KEY] ?? {};
  let round = item.state ? (mcpReq.requestState()?.round ?? 0) : 0;
  let asked = Object.entries(item.rounds[round]);
  if (item.undeclared === 'omitted') asked = asked.filter(([, { method }]) => CAPABILITY[method] in declared);
  const isAnswered = asked.every(([key, request]) => isAnswer(request, responses[key]));
  if (isAnswered && (!item.state || mcpReq.requestState() !== undefined)) {
    round += 1;
    if (round === item.rounds.length) return undefined;
    asked = Object.entries(item.rounds[round]);
  }
  const inputRequests = Object.fromEntries(asked);
  return {
    resultType: 'input_required', inputRequests, ...(item.state && { requestState: await states.mint({ round }) }),
  };
}

async function call(tool, args, context) {
  const { mcpReq } = context;
  for (const line of tool.log ?? []) {
    await mcpReq.log('info', line);
    await pause(STEP_MS);
  }
  const progressToken = mcpReq._meta?.progressToken;
  for (const progress of progressToken === undefined ? [] : (tool.progress ?? [])) {
    await mcpReq.notify({ method: 'notifications/progress', params: { progressToken, progress, total: 100 } });
    await pause(STEP_MS);
  }
  if (tool.ask) return text(JSON.stringify(await mcpReq.send(filled(tool.ask, args))));
  if (tool.rounds) return (await missing(tool, context)) ?? text(`state-ok ${JSON.stringify(mcpReq.inputResponses)}`);
  if (tool.publish) {
    tool.publish === 'tools' ? modern.notify.toolsChanged() : modern.notify.promptsChanged();
    return text('announced');
  }
  if (tool.reconnect) {
    context.http?.closeSSE?.();
    await pause(2 * STEP_MS);
  }
  return filled(tool.answer, args);
}

function read(uri) {
  const found = OFFER.resources.find((resource) => resource.uri === uri);
  if (found) return found;
  for (const { uriTemplate, ...template } of OFFER.templates) {
    const [before, name, after] = uriTemplate.split(/[{}]/);
    if (uri.startsWith(before) && uri.endsWith(after)) {
      return filled({ ...template, uri }, { [name]: uri.slice(before.length, uri.length - after.length) });
    }
  }
  throw new ResourceNotFoundError(uri);
}

function described(resource) {
  const { text: _text, blob: _blob, ...rest } = resource;
  return rest;
}

function makeServer() {
  const capabilities = {
    tools: { listChanged: true }, prompts: { listChanged: true }, resources: { subscribe: true, listChanged: true },
    logging: {}, completions: {},
  };
  const made = new McpServer(
    { name: 'everything-typescript', version: '1.0.0' }, { capabilities, requestState: { verify: states.verify } },
  );
  for (const tool of OFFER.tools) {
    const { description, inputSchema } = tool;
    made.registerTool(tool.name, { description, inputSchema: fromJsonSchema(inputSchema) }, (args, context) => call(tool, args, context));
  }
  const on = (method, handler) => made.server.setRequestHandler(method, handler);
  on('resources/list', () => ({ resources: OFFER.resources.map(described) }));
  on('resources/templates/list', () => ({ resourceTemplates: OFFER.templates.map(described) }));
  on('resources/read', ({ params }) => {
    const { name: _name, description: _description, ...contents } = read(params.uri);
    return { contents: [contents] };
  });
  on('resources/subscribe', () => ({}));
  on('resources/unsubscribe', () => ({}));
  on('prompts/list', () => ({
    prompts: OFFER.prompts.map(({ name, description, arguments: args }) => ({ name, description, arguments: args })),
  }));
  on('prompts/get', async ({ params }, context) => {
    const prompt = OFFER.prompts.find(({ name }) => name === params.name);
    if (!prompt) throw new ProtocolError(-32602, `Unknown prompt: ${params.name}`);
    const question = prompt.rounds && (await missing(prompt, context));
    return question ?? { messages: filled(prompt.messages, params.arguments) };
  });
  on('completion/complete', () => ({ completion: { values: [], total: 0, hasMore: false } }));
  return made;
}

/** Events by stream, so that a client that comes back gets what it missed. */
class Events {
  kept = [];

  async storeEvent(stream, message) {
    return String(this.kept.push({ stream, message }));
  }

  async replayEventsAfter(last, { send }) {
    const { stream } = this.kept[Number(last) - 1];
    for (const [index, event] of this.kept.entries()) {
      const isMessage = Object.keys(event.message ?? {}).length > 0; // the first event of a stream carries none
      if (index >= Number(last) && event.stream === stream && isMessage) await send(String(index + 1), event.message);
    }
    return stream;
  }
}

const modern = createMcpHandler(makeServer, { legacy: 'reject' });
const answerModern = toNodeHandler(modern);
const sessions = new Map();

async function openSession() {
  const transport = new NodeStreamableHTTPServerTransport({
    sessionIdGenerator: randomUUID,
    eventStore: new Events(),
    retryInterval: RETRY_MS,
    onsessioninitialized: (id) => { sessions.set(id, transport); },
  });
  transport.onclose = () => { sessions.delete(transport.sessionId); };
  await makeServer().connect(transport);
  return transport;
}

function refuse(response, status, code, message) {
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(JSON.stringify({ jsonrpc: '2.0', id: null, error: { code, message } }));
}

async function body(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  try {
    return JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch {
    return undefined;
  }
}

const isAllowedHost = localhostHostValidation();

createServer(async (request, response) => {
  if (!isAllowedHost(request, response)) return; // it has answered
  const id = request.headers['mcp-session-id'];
  let message;
  if (request.method === 'POST') {
    message = await body(request);
    if (message === undefined) return refuse(response, 400, -32700, 'Parse error');
    const { kind } = classifyInboundRequest({
      httpMethod: 'POST', body: message, protocolVersionHeader: request.headers['mcp-protocol-version'],
      mcpMethodHeader: request.headers['mcp-method'],
    });
    if (kind !== 'legacy') return answerModern(request, response, message);
  }
  if (id === undefined && isInitializeRequest(message)) return (await openSession()).handleRequest(request, response, message);
  if (id === undefined) return refuse(response, 400, -32000, 'Mcp-Session-Id header is required');
  if (!sessions.has(id)) return refuse(response, 404, -32001, 'Session not found');
  return sessions.get(id).handleRequest(request, response, message);
}).listen(Number(process.argv[2]), '127.0.0.1');
