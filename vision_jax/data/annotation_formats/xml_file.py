"""XML of annotations, in whatever encoding its tool declares, and without entities."""

import codecs
import re
from xml.etree import ElementTree

# Decoders for what writers really mean by these names, after https://encoding.spec.whatwg.org
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
_MULTI_BYTE = frozenset(
    {"gb2312", "gbk", "gb18030", "hz", "big5", "big5hkscs", "cp950", "shift_jis", "cp932"}
    | {"shift_jisx0213", "shift_jis_2004", "euc_jp", "iso2022_jp", "euc_kr", "cp949", "johab"}
)


def parse_xml(data: bytes, root_tag: str, advice: str) -> ElementTree.Element:
    """The root of an XML file, of this name; `advice` is what to do about another one.

    Expat knows UTF-8, UTF-16 and encodings of one byte; declared ones of several are decoded.

    A text that declares UTF-16 and is none was saved in UTF-8 afterwards, as .NET's writers do.

    Raises:
      ElementTree.ParseError, ValueError, LookupError: no XML, another root, or a DOCTYPE.
    """
    text: str | bytes = data
    declared = re.match(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]{1,40})[\"']", data)
    if declared:
        name = codecs.lookup(declared[1].decode()).name
        if name in _MULTI_BYTE:
            try:
                text = data.decode(name)
            except UnicodeDecodeError:
                text = data.decode(_SUPERSETS.get(name, name))
        elif name == "utf-16":
            text = data.decode()
    root = ElementTree.fromstring(text, ElementTree.XMLParser(target=_WithoutDoctype()))
    if root.tag.lower() != root_tag:
        raise ValueError(f"its root is <{root.tag}> and not <{root_tag}>: {advice}")
    return root


class _WithoutDoctype(ElementTree.TreeBuilder):
    """A document type can define entities, which expand, or name files; annotations need none."""

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("has a DOCTYPE, which annotations don't need: remove it")
