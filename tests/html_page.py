"""A page of ours as a reader sees it: rows of its tables, figures, links, and whether its tags are closed in order."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page.

    Attributes:
        open: tags that were not closed.
        rows: by the first cell's text the others of its row, of the first row of that name.
        tables: rows by their table's `data-name`; a cell is its text, or the numbers that it holds in full.
        sources: what attributes refer to.
        tags, attributes: the names of all that are there.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.tables, self.sources = [], {}, {}, []
        self.tags, self.attributes = set(), set()
        self._cells, self._numbers, self._name = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.attributes |= given.keys()
        self.sources += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "action")]
        self._name = given.get("data-name", self._name)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._cells, self._numbers = [], []
        if tag in ("td", "th"):
            self._cells.append("")
            self._numbers.append([])
        if tag == "data" and {"td", "th"} & set(self.open):
            self._numbers[-1].append(float(given["value"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and self._cells:
            self.rows.setdefault(self._cells[0], self._cells[1:])
            cells = [numbers or text for text, numbers in zip(self._cells, self._numbers, strict=True)]
            self.tables.setdefault(self._name, []).append(cells)

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self._cells[-1] += data
