"""What followed which tokens, in all texts of a replica: a trie of their windows, with counts.

Each position of a text starts a window of at most `depth` tokens, and each window is a path from the root. A node's
count is the number of windows that pass through it or end there: how often its tokens occurred. While they occurred
once, the node is a leaf that points into its text, and nothing lies under it; so text that does not repeat itself takes
few nodes, and a text's own windows that have not reached a leaf are just the suffixes of it that occurred elsewhere.

Nodes are numbers into flat arrays, not objects: the collector has nothing to walk.
"""

from array import array
from collections.abc import Iterator

_BITS = 32
_NONE = -1


class Text:
    """One sequence in a trie: tokens, of which the first num_indexed are in the trie.

    active: the node of its last 1, 2, ... tokens, as far as these occurred elsewhere and are shorter than the depth.
    """

    __slots__ = ("active", "is_ended", "num_indexed", "num_removed", "number", "root", "tokens")

    def __init__(self, number: int, root: int) -> None:
        self.number = number
        self.root = root
        self.tokens: array[int] = array("I")
        self.num_indexed = 0
        self.num_removed = 0
        self.active: list[int] = []
        self.is_ended = False


class SuffixTrie:
    """Windows of at most depth tokens, 2 or more, of many texts. Adding and removing a token each take O(depth).

    Longer continuations than the depth are read from the text where they last occurred.
    """

    def __init__(self, depth: int) -> None:
        assert depth >= 2
        self._depth = depth
        self._texts: dict[int, Text] = {}
        self._next_number = 0
        # parent << 32 | token -> child
        self._children: dict[int, int] = {}
        self._free: list[int] = []
        self._token = array("I")
        self._count = array("i")
        # The child with the highest count, _NONE where that has to be looked for among the children.
        self._best = array("i")
        self._first_child = array("i")
        self._next_sibling = array("i")
        self._last_sibling = array("i")
        # Of a leaf, or a node of full depth: text << 32 | the position after its (latest) occurrence. Else _NONE.
        self._owner = array("q")

    @property
    def depth(self) -> int:
        """Tokens of the longest window."""
        return self._depth

    @property
    def num_nodes(self) -> int:
        """Nodes in use, roots included."""
        return len(self._token) - len(self._free)

    def add_root(self) -> int:
        """A root of its own, for texts that share nothing with others."""
        return self._new_node(0, _NONE)

    def drop_root(self, root: int) -> None:
        """Of a root whose texts have all been removed."""
        assert self._count[root] == 0
        self._free.append(root)

    def new_text(self, root: int) -> Text:
        """An empty text under a root."""
        text = self._texts[self._next_number] = Text(self._next_number, root)
        self._next_number += 1
        self._count[root] += 1
        return text

    def index_next(self, text: Text) -> None:
        """Enters the text's first token that is not yet in the trie."""
        end = text.num_indexed
        token = text.tokens[end]
        end += 1
        text.num_indexed = end
        children, counts, bests = self._children, self._count, self._best
        here = text.number << _BITS | end
        active = []
        depth = 0
        # The windows that start at this token, at the one before, ...: shorter ones first, so that windows of other
        # texts that become active again do so in order.
        for parent in (text.root, *text.active):
            depth += 1
            key = parent << _BITS | token
            node = children.get(key, _NONE)
            if node == _NONE:
                node = children[key] = self._new_node(token, here)
                if depth > 1:
                    self._link(parent, node)
                continue
            count = counts[node] = counts[node] + 1
            if depth > 1:
                best = bests[parent]
                if best != node and best != _NONE and count >= counts[best]:
                    bests[parent] = node
            if depth == self._depth:
                self._owner[node] = here
                continue
            owner = self._owner[node]
            if owner != _NONE:
                self._open_leaf(node, owner)
            active.append(node)
        text.active = active

    def end(self, text: Text) -> None:
        """No more tokens of the text will be entered."""
        text.is_ended = True
        text.active = []
        del text.tokens[text.num_indexed :]

    def remove_next(self, text: Text) -> None:
        """Removes the first window that is left, of which there must be one, of an ended text."""
        self._remove_window(text, text.num_removed)
        text.num_removed += 1

    def drop(self, text: Text) -> None:
        """Of an ended text with no window left."""
        assert text.is_ended
        assert text.num_removed == text.num_indexed
        self._count[text.root] -= 1
        del self._texts[text.number]

    def is_used(self, root: int) -> bool:
        """Whether any text is under this root."""
        return self._count[root] > 0

    def continuation(self, text: Text) -> Iterator[tuple[int, int, int, int]]:
        """What most often followed the longest suffix of the text that was followed by anything elsewhere.

        Yields (token, its count, occurrences of what it follows but for the text's own end, length of what it follows),
        each token given those before it, without end while texts go on.
        """
        said: list[int] = []
        for index in range(len(text.active) - 1, -1, -1):
            node = text.active[index]
            child = self._best_child(node)
            if child == _NONE:
                continue
            length = index + 1
            total = self._count[node] - 1
            while child != _NONE:
                said.append(self._token[child])
                yield self._token[child], self._count[child], total, length
                node, total = child, self._count[child]
                length += 1
                if self._owner[node] != _NONE:
                    yield from self._read_on(self._owner[node], length, text, said)
                    return
                child = self._best_child(node)
            return

    def _read_on(self, owner: int, length: int, reader: Text, said: list[int]) -> Iterator[tuple[int, int, int, int]]:
        text = self._texts.get(owner >> _BITS)
        if text is None:
            return
        for position in range(owner & (1 << _BITS) - 1, text.num_indexed):
            said.append(text.tokens[position])
            yield text.tokens[position], 1, 1, length
            length += 1
        # A text that repeats itself arrived at its own end: what is said here follows there.
        position = max(0, (owner & (1 << _BITS) - 1) - text.num_indexed)
        while text is reader:
            said.append(said[position])
            yield said[position], 1, 1, length
            position += 1
            length += 1

    def _new_node(self, token: int, owner: int) -> int:
        """Not linked to its parent; count 1, or 0 for a root."""
        count = 0 if owner == _NONE else 1
        if self._free:
            node = self._free.pop()
            self._token[node], self._count[node], self._owner[node] = token, count, owner
            self._best[node] = self._first_child[node] = _NONE
            self._next_sibling[node] = self._last_sibling[node] = _NONE
            return node
        self._token.append(token)
        self._count.append(count)
        self._owner.append(owner)
        for links in (self._best, self._first_child, self._next_sibling, self._last_sibling):
            links.append(_NONE)
        return len(self._token) - 1

    def _link(self, parent: int, node: int) -> None:
        first = self._first_child[parent]
        if first == _NONE:
            self._best[parent] = node
        else:
            self._next_sibling[node] = first
            self._last_sibling[first] = node
            best = self._best[parent]
            if best != _NONE and self._count[best] <= 1:
                self._best[parent] = node
        self._first_child[parent] = node

    def _open_leaf(self, node: int, owner: int) -> None:
        """A second window came: the first goes on under the node by itself, or from now on with its text."""
        self._owner[node] = _NONE
        text = self._texts[owner >> _BITS]
        end = owner & (1 << _BITS) - 1
        if end < text.num_indexed:
            token = text.tokens[end]
            child = self._children[node << _BITS | token] = self._new_node(token, owner + 1)
            self._link(node, child)
        elif not text.is_ended:
            text.active.append(node)

    def _remove_window(self, text: Text, start: int) -> None:
        tokens, children, counts = text.tokens, self._children, self._count
        parent = text.root
        for depth, position in enumerate(range(start, min(start + self._depth, text.num_indexed))):
            key = parent << _BITS | tokens[position]
            node = children[key]
            is_last = self._owner[node] != _NONE
            counts[node] -= 1
            if depth and self._best[parent] == node:
                self._best[parent] = _NONE
            if not counts[node]:
                del children[key]
                if depth:
                    self._unlink(parent, node)
                self._free.append(node)
            if is_last:
                return
            parent = node

    def _unlink(self, parent: int, node: int) -> None:
        before, after = self._last_sibling[node], self._next_sibling[node]
        if before == _NONE:
            self._first_child[parent] = after
        else:
            self._next_sibling[before] = after
        if after != _NONE:
            self._last_sibling[after] = before

    def _best_child(self, node: int) -> int:
        best = self._best[node]
        if best == _NONE:
            child = self._first_child[node]
            highest = 0
            while child != _NONE:
                if self._count[child] > highest:
                    best, highest = child, self._count[child]
                child = self._next_sibling[child]
            self._best[node] = best
        return best
