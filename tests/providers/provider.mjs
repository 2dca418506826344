// A certified OpenID provider (npm oidc-provider) with two people in it, on loopback. Arguments: port, file of the MCP server's public JWK set.
// Tokens for a resource that ends in /opaque mean nothing but to the provider itself; others are JWTs.
import fs from 'node:fs';
import http from 'node:http';
import { Provider } from 'oidc-provider';

const [port, jwksFile] = process.argv.slice(2);
const people = {
  alice: { email: 'alice@corp.example', roles: ['analyst'] },
  bob: { email: 'bob@corp.example', roles: ['engineer'] },
};
const none = { redirect_uris: [], response_types: [], grant_types: [] };

const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [
    {
      client_id: 'agent',
      token_endpoint_auth_method: 'none',
      redirect_uris: ['https://agent.corp.example/callback'],
      grant_types: ['authorization_code'],
      response_types: ['code'],
    },
    { ...none, client_id: 'mcp-secret', client_secret: 'only for tests', token_endpoint_auth_method: 'client_secret_basic' },
    {
      ...none,
      client_id: 'mcp-key',
      token_endpoint_auth_method: 'private_key_jwt',
      jwks: JSON.parse(fs.readFileSync(jwksFile, 'utf8')),
    },
  ],
  clientAuthMethods: ['none', 'client_secret_basic', 'private_key_jwt'],
  scopes: ['openid', 'offline_access', 'mcp'],
  findAccount: (_, id) => (people[id] ? { accountId: id, claims: async () => ({ sub: id }) } : undefined),
  extraTokenClaims: async (_, token) => people[token.accountId],
  features: {
    devInteractions: { enabled: true },
    registration: { enabled: true },
    introspection: { enabled: true, allowedPolicy: async () => true },
    revocation: { enabled: true, allowedPolicy: async () => true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo: (_, resource) => ({
        scope: 'mcp',
        audience: resource,
        accessTokenTTL: 300,
        accessTokenFormat: resource.endsWith('/opaque') ? 'opaque' : 'jwt',
      }),
    },
  },
  pkce: { required: () => true },
  cookies: { keys: ['only for tests'] },
});

http.createServer(provider.callback()).listen(Number(port), '127.0.0.1', () => console.log('listening'));
