"""Reports on this machine, and on how far training's numbers differ from sampling's."""
