"""The checks of `gserve doctor`: whether this machine, and a node, have everything that servers need."""
