"""Pure decisions: no clock, no socket, no environment, no logger; time and randomness are arguments."""
