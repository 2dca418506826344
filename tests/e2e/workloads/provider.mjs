// A certified OpenID provider (npm oidc-provider) with two people in it. Arguments: issuer, audience, key file, certificate file.
import fs from 'node:fs';
import https from 'node:https';
import { Provider } from 'oidc-provider';

const [issuer, audience, keyFile, certificateFile] = process.argv.slice(2);
const people = {
  alice: { email: 'alice@corp.example', role: 'analyst', groups: ['data'] },
  bob: { email: 'bob@corp.example', role: 'engineer', groups: ['data', 'platform'] },
};

const provider = new Provider(issuer, {
  clients: [{
    client_id: 'agent',
    token_endpoint_auth_method: 'none',
    redirect_uris: ['https://agent.corp.example/callback'],
    grant_types: ['authorization_code'],
    response_types: ['code'],
  }],
  findAccount: (_, id) => (people[id] ? { accountId: id, claims: async () => ({ sub: id }) } : undefined),
  extraTokenClaims: async (_, token) => people[token.accountId],
  features: {
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => audience,
      useGrantedResource: () => true,
      getResourceServerInfo: (_, resource) => ({
        scope: 'mcp', audience: resource, accessTokenTTL: 3600, accessTokenFormat: 'jwt',
      }),
    },
  },
  pkce: { required: () => true },
  cookies: { keys: ['only for tests'] },
});

const server = https.createServer(
  { key: fs.readFileSync(keyFile), cert: fs.readFileSync(certificateFile) }, provider.callback(),
);
server.listen(8443, '::', () => console.log('listening'));
