"""Graphs on plain dictionaries: search, shortest paths, components, ordering."""

import heapq
from collections import deque


class Graph:
    """A directed graph with weights. Nodes may be any hashable value."""

    def __init__(self, directed=True):
        self.directed = directed
        self._edges = {}

    def add_node(self, node):
        self._edges.setdefault(node, {})

    def add_edge(self, source, target, weight=1):
        if weight < 0:
            raise ValueError("weight must not be negative, got %r" % weight)
        self.add_node(source)
        self.add_node(target)
        self._edges[source][target] = weight
        if not self.directed:
            self._edges[target][source] = weight

    def remove_edge(self, source, target):
        del self._edges[source][target]
        if not self.directed:
            del self._edges[target][source]

    def nodes(self):
        return list(self._edges)

    def edges(self):
        for source, targets in self._edges.items():
            for target, weight in targets.items():
                yield source, target, weight

    def neighbors(self, node):
        return self._edges[node].keys()

    def weight(self, source, target):
        return self._edges[source][target]

    def __len__(self):
        return len(self._edges)

    def __contains__(self, node):
        return node in self._edges

    def reversed(self):
        result = Graph(self.directed)
        for node in self._edges:
            result.add_node(node)
        for source, target, weight in self.edges():
            result.add_edge(target, source, weight)
        return result


def breadth_first(graph, start):
    seen = {start}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        yield node
        for neighbor in graph.neighbors(node):
            if neighbor not in seen:
                seen.add(neighbor)
                queue.append(neighbor)


def depth_first(graph, start):
    seen = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(n for n in graph.neighbors(node) if n not in seen)


def shortest_path(graph, start, goal):
    """Dijkstra's algorithm. Returns (distance, path) or raises ValueError."""
    distances = {start: 0}
    previous = {}
    queue = [(0, start)]
    done = set()
    while queue:
        distance, node = heapq.heappop(queue)
        if node in done:
            continue
        if node == goal:
            break
        done.add(node)
        for neighbor in graph.neighbors(node):
            candidate = distance + graph.weight(node, neighbor)
            if neighbor not in distances or candidate < distances[neighbor]:
                distances[neighbor] = candidate
                previous[neighbor] = node
                heapq.heappush(queue, (candidate, neighbor))
    if goal not in distances:
        raise ValueError("no path from %r to %r" % (start, goal))
    path = [goal]
    while path[-1] != start:
        path.append(previous[path[-1]])
    path.reverse()
    return distances[goal], path


def topological_order(graph):
    incoming = {node: 0 for node in graph.nodes()}
    for _, target, _ in graph.edges():
        incoming[target] += 1
    ready = [node for node, count in incoming.items() if count == 0]
    order = []
    while ready:
        node = ready.pop()
        order.append(node)
        for neighbor in graph.neighbors(node):
            incoming[neighbor] -= 1
            if incoming[neighbor] == 0:
                ready.append(neighbor)
    if len(order) != len(graph):
        raise ValueError("graph has a cycle")
    return order


def connected_components(graph):
    remaining = set(graph.nodes())
    components = []
    while remaining:
        start = next(iter(remaining))
        component = set(breadth_first(graph, start))
        components.append(component)
        remaining -= component
    return components


def has_cycle(graph):
    try:
        topological_order(graph)
    except ValueError:
        return True
    return False


def from_adjacency_matrix(matrix, names=None):
    size = len(matrix)
    if names is None:
        names = list(range(size))
    if len(names) != size:
        raise ValueError("expected %d names, got %d" % (size, len(names)))
    graph = Graph()
    for i, row in enumerate(matrix):
        graph.add_node(names[i])
        for j, weight in enumerate(row):
            if weight:
                graph.add_edge(names[i], names[j], weight)
    return graph
