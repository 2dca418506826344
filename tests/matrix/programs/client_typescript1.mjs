// The matrix's client on the TypeScript SDK 1.x: goes through every step, and prints a line of JSON for each.
// Arguments: the URL, and `legacy`.

import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { walk } from './client_typescript.mjs';

const require = createRequire(join(process.env.PACKAGES, 'here.cjs'));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { Client } = await load('@modelcontextprotocol/sdk/client/index.js');
const { StreamableHTTPClientTransport } = await load('@modelcontextprotocol/sdk/client/streamableHttp.js');

const client = new Client({ name: 'matrix', version: '1' });
const transport = new StreamableHTTPClientTransport(new URL(process.argv[2]));
await walk({
  client,
  connect: async () => {
    await client.connect(transport);
    return transport.protocolVersion;
  },
  call: (params, options) => client.callTool(params, undefined, options),
});
