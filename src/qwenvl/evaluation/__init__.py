"""The paper's benchmarks: their metrics, item for item as the official scorers have them."""
