"""What a page's Content-Security-Policy needs to know of the script and the style that stand in it. Pure."""

from __future__ import annotations

import base64
import hashlib
import re


def source_of(html: str, tag: str) -> str:
    """The source expression that allows the one `<script>` or `<style>` of a page, and no other: its SHA-256.

    Raises ValueError where there is none, or more than one.
    """
    [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
