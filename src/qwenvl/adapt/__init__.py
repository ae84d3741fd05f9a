"""What changes a model from outside: `model/` never mentions bits, ranks or adapters."""
