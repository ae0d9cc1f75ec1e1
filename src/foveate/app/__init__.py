"""The web page of `foveate app` (extra `[app]`). Nothing else imports it."""

import os as _os

_os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which only modules in here do
_os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
