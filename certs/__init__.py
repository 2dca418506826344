"""PKI and SPIFFE: identities, their verification, TLS, and the Workload API. Imports neither plane."""
