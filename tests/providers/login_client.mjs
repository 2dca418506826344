// An agent on the official TypeScript SDK, 1.x or 2.x, that logs in by the SDK's own OAuth code and calls a tool.
// Arguments: the URL, the tool. Prints where the user's browser has to go, reads the URL it came back with, prints the tool's answer.
import { createRequire } from 'node:module';
import { join } from 'node:path';
import readline from 'node:readline/promises';
import { pathToFileURL } from 'node:url';

const require = createRequire(join(process.env.PACKAGES, 'here.cjs'));
const load = async (...names) => Object.assign({}, ...(await Promise.all(names.map((name) => import(pathToFileURL(require.resolve(name)))))));
const sdk = await (process.env.SDK === '1'
  ? load(...['index', 'auth', 'streamableHttp'].map((name) => `@modelcontextprotocol/sdk/client/${name}.js`))
  : load('@modelcontextprotocol/client'));

const [url, tool] = process.argv.slice(2);
const redirect = 'https://agent.corp.example/callback';
const kept = {};
const provider = {
  redirectUrl: redirect,
  clientMetadata: { client_name: 'agent', redirect_uris: [redirect], grant_types: ['authorization_code'], response_types: ['code'] },
  clientInformation: () => kept.client,
  saveClientInformation: (client) => (kept.client = client),
  tokens: () => kept.tokens,
  saveTokens: (tokens) => (kept.tokens = tokens),
  codeVerifier: () => kept.verifier,
  saveCodeVerifier: (verifier) => (kept.verifier = verifier),
  discoveryState: () => kept.discovery,
  saveDiscoveryState: (discovery) => (kept.discovery = discovery),
  redirectToAuthorization: (to) => console.log(String(to)),
};
const connect = async () => {
  const client = new sdk.Client({ name: 'agent', version: '1' }, process.env.SDK === '1' ? {} : { versionNegotiation: { mode: 'auto' } });
  const transport = new sdk.StreamableHTTPClientTransport(new URL(url), { authProvider: provider });
  return { client, transport, connected: client.connect(transport) };
};

const first = await connect();
try {
  await first.connected;
  throw new Error('connected without a login');
} catch (error) {
  if (!(error instanceof sdk.UnauthorizedError)) throw error;
}
const lines = readline.createInterface({ input: process.stdin });
const back = new URL(await lines.question('')).searchParams;
lines.close();
await (process.env.SDK === '1' ? first.transport.finishAuth(back.get('code')) : first.transport.finishAuth(back));
const second = await connect();
await second.connected;
console.log(JSON.stringify(await second.client.callTool({ name: tool, arguments: {} })));
await second.client.close();
