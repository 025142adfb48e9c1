"""What a browser makes of a page that this project writes."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "use", "input"}


class Page(HTMLParser):
    """Text, resources, ids, tags and data of a page, every tag of which must close.

    Attributes:
        data: what the page holds for its scripts, by the id of the element.
        scripts: how many it has that run.
    """

    def __init__(self, text: str):
        super().__init__()
        self.text, self.resources, self.ids, self.labels, self.open, self.tags = "", [], [], [], [], set()
        self.data, self.scripts, self._json = {}, 0, ""
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag == "script":
            self._json = attributes.get("id", "") if attributes.get("type") == "application/json" else ""
            self.scripts += not self._json
        self.resources += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.resources += re.findall(r"url\(([^)]*)\)", attributes.get("style") or "")
        self.ids += [v for k, v in attrs if k == "id"]
        self.labels += [v for k, v in attrs if k == "aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and self._json:
            self.data[self._json] = json.loads(data)
        self.text += "" if self.open and self.open[-1] in ("style", "script") else data
