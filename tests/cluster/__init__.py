"""A real Kubernetes for tests and the demo, from programs that are built or found on this machine. See README.md."""
