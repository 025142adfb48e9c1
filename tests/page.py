"""What a browser makes of a page that this project writes."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "use", "input"}


class Page(HTMLParser):
    """Text, resources, ids and tags of a page, every one of which must close."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.resources, self.ids, self.labels, self.open, self.tags = "", [], [], [], [], set()
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
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
        self.text += "" if self.open and self.open[-1] == "style" else data
