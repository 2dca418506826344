"""What enforcement costs, beside proxies that enforce nothing: `python -m bench` (docs/explanation/performance.md)."""
