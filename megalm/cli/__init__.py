"""The ``megalm`` command. Modules of commands are imported when their command runs, so that start-up stays quick."""
