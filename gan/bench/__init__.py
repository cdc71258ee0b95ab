"""How fast a training run is on this machine, where its time goes, and what would make it faster."""
