"""The transformer. Imports core and ops; reads no file, no network, no log."""
