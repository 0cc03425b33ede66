"""The launcher `ssh`: servers on machines that are reached by OpenSSH."""
