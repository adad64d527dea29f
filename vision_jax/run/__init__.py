"""From a config to a run: described, prepared, restored, written down. A ConfigDict stops here."""
