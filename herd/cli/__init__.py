"""The command line: one thin file per verb, imported only when that verb is called."""
