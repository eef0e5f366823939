"""What a page contains beside what its content security policy allows, read from the HTML alone."""

import base64
import hashlib
import re
from html.parser import HTMLParser

POLICY_NAME = "content-security-policy"
LOADING = {"src", "data", "poster", "srcset", "xlink:href", "background", "action", "formaction"}
DANGEROUS = {"iframe", "frame", "object", "embed", "applet", "base", "form"}


class Content(HTMLParser):
    """The inline scripts and styles of a page, its handlers, and what it loads."""

    def __init__(self, html: str):
        super().__init__()
        self.policy = ""
        self.before_policy: list[str] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.style_attributes: list[str] = []
        self.handlers: list[str] = []
        self.loads: list[tuple[str, str]] = []  # (tag, address)
        self.dangerous: list[str] = []
        self.frames: list[str] = []  # documents inside the page, which inherit its policy
        self.open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the attributes of a tag by what a policy says about them."""
        values = {name: value or "" for name, value in attrs}
        if tag == "meta" and values.get("http-equiv", "").lower() == POLICY_NAME:
            self.policy = values["content"]
        if not self.policy and tag in ("script", "style", "link", "img"):
            self.before_policy.append(tag)
        is_data = values.get("type", "") not in ("", "text/javascript", "module", "text/css")
        if tag in self.inline and "src" not in values and not is_data:
            self.inline[tag].append("")
            self.open = tag
        self.dangerous += [tag] if tag in DANGEROUS else []
        self.frames += [values["srcdoc"]] if "srcdoc" in values else []
        self.style_attributes += [values["style"]] if "style" in values else []
        self.handlers += [name for name in values if name.startswith("on")]
        is_fetched = tag in ("link", "image", "use")
        for name, value in values.items():
            if name in LOADING or (name == "href" and is_fetched):
                self.loads.append((tag, value))
            if name == "href" and value.strip().lower().startswith("javascript:"):
                self.handlers.append(value)

    def handle_endtag(self, tag: str) -> None:
        """Close the script or style that is open."""
        self.open = "" if tag == self.open else self.open

    def handle_data(self, data: str) -> None:
        """Add text to the script or style that is open."""
        if self.open:
            self.inline[self.open][-1] += data


def directives(policy: str) -> dict[str, list[str]]:
    """Return the sources of every directive of a policy."""
    words = [part.split() for part in policy.split(";") if part.strip()]
    return {name: sources for name, *sources in words}


def digest(text: str) -> str:
    """Return the source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def find_script_faults(html: str) -> list[str]:
    """Return the faults of a page that may have any style but only forms of its own site."""
    return [x for x in find_faults(html) if not x.startswith("style")]


def find_faults(html: str) -> list[str]:
    """Return a sentence for everything that a page's policy forbids or fails to forbid."""
    content = Content(html)
    if not content.policy:
        return ["no policy"]
    rules = directives(content.policy)
    bad = [f"{tag} before the policy" for tag in content.before_policy]
    if rules.get("default-src") != ["'none'"]:
        bad.append("default-src is not 'none'")
    for name, sources in rules.items():
        pattern = r"'none'|'self'|data:|'sha256-[\w+/]{43}='|'unsafe-hashes'"
        bad += [f"{name} allows {s}" for s in sources if not re.fullmatch(pattern, s)]
    for tag, texts in content.inline.items():
        allowed = rules.get(f"{tag}-src", [])
        bad += [f"{tag} not allowed: {x[:60]}" for x in texts if digest(x) not in allowed]
    styles = rules.get("style-src-attr", rules.get("style-src", []))
    for style in content.style_attributes:
        if "'unsafe-hashes'" not in styles or digest(style) not in styles:
            bad.append(f"style attribute not allowed: {style[:60]}")
    bad += [f"event handler {x}" for x in content.handlers]
    bad += [f"loads {x}" for _, x in content.loads if re.match(r"\s*(?:[a-z]+:)?//", x, re.I)]
    scripts = rules.get("script-src", [])
    for frame in map(Content, content.frames):
        texts = frame.inline["script"]
        bad += [
            f"script in a frame not allowed: {x[:60]}" for x in texts if digest(x) not in scripts
        ]
    for document in content.frames:
        bad += find_faults(document)
    missing = {"base-uri", "form-action"} - set(rules)
    return bad + [f"{name} is not limited" for name in sorted(missing)]
