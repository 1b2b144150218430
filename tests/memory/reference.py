r"""The engine in NumPy, one row, head, token and role at a time.

Every role is a memory of its own with errors back-propagated by hand:

    S_t = momentum_t S_{t-1} + inner_lr_t delta_t x_t^T
    W_t = retention_t W_{t-1} - erase inner_lr_t (W_{t-1} x_t) x_t^T - S_t

applied to W, or with retention acting on W - W_initial. The erased read may use
the weights after retention.
"""

import numpy as np

from tests.memory import problems


def run(problem, rule, *, objective, use_marks):
  """Runs a problem token by token.

  Args:
    problem: A `problems.Problem`.
    rule: The `memory.Rule`; its functions are not used.
    objective: 'l2' or 'dot'.
    use_marks: Whether the problem's borders and gaps count.

  Returns:
    Reads [b, h, t, d], zero for tokens that are not there, and the last memory
    in the engine's stacked layout.
  """
  inputs = {k: np.asarray(v) for k, v in problem.inputs.items()}
  batch_size, heads, num_tokens, dim = inputs['x'].shape
  reads = np.zeros((batch_size, heads, num_tokens, dim))
  last = []
  for b in range(batch_size):
    last.append([])
    for h in range(heads):
      initial = _split(
        {k: np.asarray(v)[h] for k, v in problem.initial.items()}
      )
      present = range(num_tokens)
      borders = np.zeros(num_tokens, bool)
      if use_marks:
        present = np.flatnonzero(problem.mask[b])
        borders = np.asarray(problem.reset[b])
      tokens = {k: v[b, h] for k, v in inputs.items()}
      roles = _run_head(
        initial, tokens, present, borders, rule, objective, reads[b, h]
      )
      last[-1].append(_join(roles))
  stack = lambda name: np.stack([[m[name] for m in row] for row in last])
  return reads, {name: stack(name) for name in problem.initial}


def _run_head(initial, tokens, present, borders, rule, objective, reads):
  copy = lambda: [dict(role) for role in initial]
  roles = anchor = copy()
  trace = [dict.fromkeys(role, 0.0) for role in initial]
  for count, t in enumerate(present):
    if borders[t]:
      roles, anchor = copy(), copy()
      trace = [dict.fromkeys(role, 0.0) for role in initial]
    if count % rule.chunk_size == 0:
      anchor = [dict(role) for role in roles]
    x = tokens['x'][t]
    key = _normalize(_predict(anchor[0], x))
    value = _normalize(_predict(anchor[1], x))
    inner_lr = 0.5 * _sigmoid(_predict(anchor[2], x) - 1.0)[0]
    retention = _sigmoid(_predict(anchor[3], x) + 2.0)[0]
    momentum = tokens['momentum'][t, 0] if rule.momentum else 0.0
    for i, role in enumerate(roles):
      target = _predict(anchor[i], value)
      if i < 2:
        target = _normalize(target)
      for name, (u, delta) in _errors(
        anchor[i], key, target, objective
      ).items():
        if rule.learns == 'output' and name != 'out' and len(role) > 1:
          continue
        rate = inner_lr
        if name == 'out' and rule.erase in ('output', 'every_map'):
          rate = inner_lr / (u @ u + 0.01)
        erase = (
          rule.erase == 'every_map'
          or (rule.erase == 'input' and name != 'out')
          or (rule.erase == 'output' and (name == 'out' or len(role) == 1))
        )
        weights = role[name]
        centre = initial[i][name] if rule.retain_to == 'initial' else 0.0
        trace[i][name] = momentum * trace[i][name] + rate * np.outer(delta, u)
        kept = centre + retention * (weights - centre)
        before = kept if rule.erase_from == 'retained' else weights
        role[name] = (
          kept - erase * rate * np.outer(before @ u, u) - trace[i][name]
        )
    query = tokens['q'][t]
    reads[t] = _predict((roles if rule.read == 'token' else anchor)[0], query)
  return roles


def _predict(role, x):
  if 'out' not in role:
    return role['in'] @ x
  hidden = role['in'] @ x
  skip = role['skip'] @ x if 'skip' in role else x
  return skip + role['out'] @ (hidden * _sigmoid(hidden))


def _errors(role, x, target, objective):
  """Each map's input and the objective's gradient at its output."""
  error = _predict(role, x) - target if objective == 'l2' else -target
  if 'out' not in role:
    return {'in': (x, error)}
  hidden = role['in'] @ x
  gate = _sigmoid(hidden)
  slope = gate + hidden * gate * (1.0 - gate)
  errors = {
    'in': (x, slope * (role['out'].T @ error)),
    'out': (hidden * gate, error),
  }
  if 'skip' in role:
    errors['skip'] = (x, error)
  return errors


def _split(stacked):
  """The engine's stacked maps of one head as four roles."""
  weights = stacked['in']
  if 'vector' not in stacked:
    cuts = np.cumsum([problems.DIM, problems.DIM, 1])
    return [{'in': part} for part in np.split(weights, cuts)]
  cuts = problems.HIDDEN * np.arange(1, 5)
  *parts, skips = np.split(weights, cuts)
  return [
    {'in': parts[0], 'out': stacked['vector'][0]},
    {'in': parts[1], 'out': stacked['vector'][1]},
    {'in': parts[2], 'out': stacked['scalar'][0], 'skip': skips[:1]},
    {'in': parts[3], 'out': stacked['scalar'][1], 'skip': skips[1:]},
  ]


def _join(roles):
  weights = [role['in'] for role in roles]
  if 'out' not in roles[0]:
    return {'in': np.concatenate(weights)}
  weights += [role['skip'] for role in roles if 'skip' in role]
  outs = [role['out'] for role in roles]
  return {
    'in': np.concatenate(weights),
    'vector': np.stack(outs[:2]),
    'scalar': np.stack(outs[2:]),
  }


def _normalize(x):
  return x / np.sqrt(x @ x + 1e-6)


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))
