"""The web page of `foveate app` (extra `[app]`). Nothing else imports it."""
