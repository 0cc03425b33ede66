"""The engines that are built in."""
