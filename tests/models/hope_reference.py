r"""Hope as printed in NumPy: one row, token, head and memory at a time.

A block has one mixer and a chain. Equations are those of Behrouz et al., Nested
Learning, arXiv:2512.24695, 2025. With M(x) = x + W1 silu(W2 x), per head:

    k, v, lr, r from the memories at their chunk's start            (83-84)
    v^ = M(v), M at its chunk's start, for every memory                (85)
    o = M_main(q), M at its chunk's start                          (90, 94)
    W <- r W - lr (W u) u^T - lr delta u^T for W1 and W2       (88, 93, 96)

u is the input of a map and delta the gradient of 1/2 |M(k) - v^|^2 at its
output. Then the chain, with the weights before the segment:

    y = MLP_fast(MLP_middle(MLP_slow(o)))                          (70, 97)
    W <- W - lr / (1 + lr sum |u|^2) sum (W u u^T + e u^T)         (57, 71)

with e the gradient of the next-token loss, summed over the level's chunk.
"""

import numpy as np

_EPSILON = 1e-6  # under the roots of norms
_HIDDEN = 1e-2  # added to the square of a hidden input's norm
_WIDTH = 4  # tokens of the convolution


def read_row(params, config, inner, tokens, reset):
  """Reads one row.

  Args:
    params: Parameters of a model of one block, as NumPy arrays.
    config: The `ModelConfig`; its functions are not used.
    inner: The `InnerConfig`.
    tokens: int [t].
    reset: bool [t], first tokens of documents.

  Returns:
    Logits [t, v], and the weights of the levels by name.
  """
  block = _first(params['blocks'])
  mixer = block['mixer']
  heads = [_Head(h, mixer, config.mixer) for h in range(config.mixer.num_heads)]
  chain = _Chain(params, block['levels'], config.levels, inner)
  kernel = mixer['conv']['kernel'].reshape(_WIDTH, *mixer['in'].shape[1:])
  logits, recent = [], []
  for t, token in enumerate(tokens):
    x = params['embedding'][token] * np.sqrt(config.embed_dim)
    normed = _rms(x) * block['norm']
    recent = [] if reset[t] else recent[1 - _WIDTH :]
    recent = [*recent, np.einsum('e,ehsd->hsd', normed, mixer['in'])]
    filters = kernel[-len(recent) :]
    projected = _silu(sum(w * z for w, z in zip(filters, recent, strict=True)))
    gate = _silu(np.einsum('e,ehd->hd', normed, mixer['gate']))
    for h, head in enumerate(heads):
      read = head.step(*projected[h], reset[t])
      x = x + (_rms(read) * mixer['norm'] * gate[h]) @ mixer['out'][h]
    logits.append(chain.read(x))
    if t + 1 < len(tokens) and not reset[t + 1]:
      chain.learn(t, tokens[t + 1])
    chain.step(t)
  return np.stack(logits), chain.weights


class _Head:
  """The memories of one head."""

  def __init__(self, index, params, config):
    self.bias = {
      group: {name: b[index] for name, b in rates.items()}
      for group, rates in params['bias'].items()
    }
    self.adaptive = config.adaptive
    self.max_inner_lr = config.max_inner_lr
    initial = {
      group: _first(maps, index) for group, maps in params['memory'].items()
    }
    self.main = _Group(_split(initial['main'], ['main'], []), config.chunk_size)
    vectors = [role for role in ('v', 'q', 'k') if role in config.adaptive]
    self.others = _Group(
      _split(initial['others'], vectors, ['inner_lr', 'retention']),
      config.chunk_size_others,
    )

  def step(self, x_k, x_v, x_q, starts):
    """Reads and writes a token; returns the read [d]."""
    self.main.begin(starts)
    self.others.begin(starts)
    made = {'k': _l2(x_k), 'v': _l2(x_v), 'q': _l2(x_q)}
    raw = {
      name: self.others.predict(name, made['k'])[0]
      for name in ('inner_lr', 'retention')
    }
    for role in set(made) & set(self.adaptive):
      made[role] = _l2(self.others.predict(role, made[role]))
    read = self.main.predict('main', made['q'])
    for name, group in (('main', self.main), ('others', self.others)):
      inner_lr, retention = (
        1 / (1 + np.exp(-raw[rate] - self.bias[name][rate])) for rate in raw
      )
      inner_lr = self.max_inner_lr * inner_lr
      group.write(made['k'], made['v'], inner_lr, retention)
    return read


class _Group:
  """Memories of one head that share a clock."""

  def __init__(self, initial, chunk_size):
    self.initial, self.chunk_size, self.count = initial, chunk_size, 0
    self.now, self.anchor = initial, initial

  def begin(self, starts):
    if starts:
      self.now, self.anchor = self.initial, self.initial
    if self.count % self.chunk_size == 0:
      self.anchor = self.now
    self.count += 1

  def predict(self, role, x):
    maps = self.anchor[role]
    skip = maps['skip'] @ x if 'skip' in maps else x
    return skip + maps['out'] @ _silu(maps['in'] @ x)

  def write(self, key, value, inner_lr, retention):
    self.now = {
      role: self._written(role, key, value, inner_lr, retention)
      for role in self.now
    }

  def _written(self, role, key, value, inner_lr, retention):
    target = self.predict(role, value)
    if 'skip' not in self.now[role]:
      target = _l2(target)
    error = self.predict(role, key) - target
    anchor = self.anchor[role]
    before = anchor['in'] @ key
    hidden = _silu(before)
    writes = {
      'in': (key, _slope(before) * (anchor['out'].T @ error), inner_lr),
      'out': (hidden, error, inner_lr / (hidden @ hidden + _HIDDEN)),
      'skip': (key, error, inner_lr),
    }
    maps = {}
    for name, w in self.now[role].items():
      u, delta, rate = writes[name]
      maps[name] = retention * w - rate * np.outer(w @ u + delta, u)
    return maps


class _Chain:
  """The levels, and what they accumulate between their steps."""

  def __init__(self, params, weights, levels, inner):
    self.embedding, self.norm = params['embedding'], params['norm']
    self.weights = dict(weights)
    rates = zip(levels, inner.levels, strict=True)
    self.inner = {level.name: rate for level, rate in rates}
    self.segment = min(rate.update_every for rate in self.inner.values())
    self.sums = dict.fromkeys(self.weights)

  def read(self, x):
    """Returns logits [v] of the chain's input [e]."""
    self.tape = {}
    for name in reversed(self.inner):  # slowest first
      own = self.weights[name]
      normed = _rms(x) * own['norm']
      gate, up = normed @ own['gate'], normed @ own['up']
      hidden = _silu(gate) * up
      self.tape[name] = x, normed, gate, up, hidden
      x = x + hidden @ own['down']
    self.last = x
    self.logits = self.embedding @ (_rms(x) * self.norm)
    return self.logits

  def learn(self, t, target):
    """Back-propagates the loss of the token that was read last."""
    if (t + 1) % self.segment == 0:
      return  # the weights change before the target is read
    error = np.exp(self.logits - self.logits.max())
    error /= error.sum()
    error[target] -= 1
    d = _rms_back(self.last, self.norm * (error @ self.embedding))
    for name in self.inner:
      own = self.weights[name]
      x, normed, gate, up, hidden = self.tape[name]
      d_hidden = own['down'] @ d
      d_up, d_gate = d_hidden * _silu(gate), d_hidden * up * _slope(gate)
      d_normed = own['gate'] @ d_gate + own['up'] @ d_up
      steps = {
        'gate': _erase_and_learn(own['gate'], normed, d_gate),
        'up': _erase_and_learn(own['up'], normed, d_up),
        'down': _erase_and_learn(own['down'], hidden, d),
        'norm': (_rms(x) * d_normed, 0.0),
      }
      total = self.sums[name] or dict.fromkeys(steps, (0.0, 0.0))
      self.sums[name] = {
        key: (total[key][0] + g, total[key][1] + energy)
        for key, (g, energy) in steps.items()
      }
      d = d + _rms_back(x, d_normed * own['norm'])

  def step(self, t):
    """Updates the levels whose chunk ends with token t."""
    for name, rate in self.inner.items():
      if (t + 1) % rate.update_every == 0:
        lr = rate.learning_rate
        self.weights[name] = {
          key: w - lr / (1 + lr * energy) * g
          for key, w in self.weights[name].items()
          for g, energy in [self.sums[name][key]]
        }
        self.sums[name] = None


def _erase_and_learn(w, u, error):
  """Returns W u u^T + e u^T for W [in, out], and |u|^2."""
  return np.outer(u, u @ w + error), u @ u


def _split(stacked, vectors, scalars):
  """Splits the engine's stacked maps of one head into roles."""
  num_roles = len(vectors) + len(scalars)
  hidden = stacked['vector'].shape[-1]
  parts = stacked['in'][: num_roles * hidden].reshape(num_roles, hidden, -1)
  skips = stacked['in'][num_roles * hidden :]
  roles = {
    role: {'in': parts[i], 'out': stacked['vector'][i]}
    for i, role in enumerate(vectors)
  }
  for i, role in enumerate(scalars):
    roles[role] = {
      'in': parts[len(vectors) + i],
      'out': stacked['scalar'][i],
      'skip': skips[i : i + 1],
    }
  return roles


def _first(tree, index=0):
  if isinstance(tree, dict):
    return {key: _first(value, index) for key, value in tree.items()}
  return tree[index]


def _silu(x):
  return x / (1 + np.exp(-x))


def _slope(x):
  gate = 1 / (1 + np.exp(-x))
  return gate + x * gate * (1 - gate)


def _l2(x):
  return x / np.sqrt(x @ x + _EPSILON)


def _rms(x):
  return x / np.sqrt(np.mean(x * x) + _EPSILON)


def _rms_back(x, d):
  """Returns the gradient at x of <d, _rms(x)>."""
  normed = _rms(x)
  return (d - normed * np.mean(d * normed)) / np.sqrt(np.mean(x * x) + _EPSILON)
