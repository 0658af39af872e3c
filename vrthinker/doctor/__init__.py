"""What this machine has, what is missing for what, and how far training's numbers are from sampling's."""
