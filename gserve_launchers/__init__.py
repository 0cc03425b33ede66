"""The launchers that are built in."""
