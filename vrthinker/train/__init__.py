"""The stages that train a judge. Each stage is one short file; they share the loop."""
