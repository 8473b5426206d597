import nvembed.eval  # noqa: F401  # first: it quiets a library that the modules here import
