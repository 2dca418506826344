// The matrix's client on the TypeScript SDK 2.x: goes through every step, and prints a line of JSON for each.
// Arguments: the URL, and `legacy` or `modern`.

import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { walk } from './client_typescript.mjs';

const require = createRequire(join(process.env.PACKAGES, 'here.cjs'));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { Client, StreamableHTTPClientTransport } = await load('@modelcontextprotocol/client');

const mode = process.argv[3] === 'legacy' ? 'legacy' : 'auto';
const client = new Client({ name: 'matrix', version: '1' }, { versionNegotiation: { mode } });
const transport = new StreamableHTTPClientTransport(new URL(process.argv[2]));
await walk({
  client,
  connect: async () => {
    await client.connect(transport);
    return client.getNegotiatedProtocolVersion();
  },
  call: (params, options) => client.callTool(params, options),
});
