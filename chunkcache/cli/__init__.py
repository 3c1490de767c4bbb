"""The command line. Commands of other packages join it by the entry point group `chunkcache.commands`."""
