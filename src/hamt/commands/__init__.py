"""The subcommands of ``hamt``, one module each."""
