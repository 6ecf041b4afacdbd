"""How a run is set up, resumed and ended."""
