"""The operator's verbs. Results on stdout, everything else on stderr; no decision of its own."""
