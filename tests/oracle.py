"""The published loops, written out plainly: slow, obvious, and what the fast code is held to.

Transcribed from the papers' equations (BiLLM, arXiv 2402.04291; DBellQuant, arXiv 2507.01027). Every candidate
of the structural search is binarized in full, every descent step goes through autograd.
"""

import torch

NAN = float("nan")


def binarize_masked(values, mask, order, sign=torch.sign):
    """Order-`order` residual binarization of `values` over `mask`, per row; zero outside the mask."""
    total = torch.zeros_like(values)
    for _ in range(order):
        residual = torch.where(mask, values - total, NAN)
        mean = residual.nanmean(dim=1, keepdim=True).nan_to_num(0)
        scale = (residual - mean).abs().nanmean(dim=1, keepdim=True).nan_to_num(0)
        term = mean + scale * sign(values - total - mean)
        total = total + torch.where(mask, term, 0)
    return total


def find_masks(scores, ordinary_order):
    columns = scores.shape[1]
    ranking = scores.abs().sum(dim=0).argsort(descending=True)
    best_error, salient = float("inf"), torch.zeros(columns, dtype=torch.bool)
    for k in range(1, min(50, columns)):
        candidate = torch.zeros(columns, dtype=torch.bool)
        candidate[ranking[:k]] = True
        mask = candidate.expand_as(scores)
        fit = binarize_masked(scores, mask, 2) + binarize_masked(scores, ~mask, ordinary_order)
        error = ((scores - fit) ** 2).mean()
        if error < best_error:
            best_error, salient = error, candidate
    ordinary = ~salient.expand_as(scores)
    magnitude = torch.where(ordinary, scores.abs(), 0)
    fit_salient = binarize_masked(scores, ~ordinary, 2)
    best_error, sparse = float("inf"), torch.zeros_like(scores, dtype=torch.bool)
    for percent in range(10, 91):
        threshold = torch.quantile(magnitude, percent / 100)
        concentrated, candidate = ordinary & (magnitude < threshold), ordinary & (magnitude >= threshold)
        fit = fit_salient + binarize_masked(scores, concentrated, 1) + binarize_masked(scores, candidate, 1)
        error = ((scores - fit) ** 2).mean()
        if error < best_error:
            best_error, sparse = error, candidate
    return salient, sparse


def one_bit_sign(values):
    """The sign that one stored bit can hold: +1 at zero, where `torch.sign` gives 0."""
    return torch.where(values >= 0, 1.0, -1.0)


def quantize_layer(weight, hessian, ordinary_order, metric="hessian", block_size=128, damping=0.01, sign=torch.sign):
    """Braq with GPTQ compensation. Returns the quantized weight and the masks of each block."""
    weight, hessian = weight.clone(), hessian.clone()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    quantized, masks = torch.zeros_like(weight), []
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block = weight[:, start:end]
        corner = upper[start:end, start:end]
        scores = block**2 / corner.diagonal() ** 2 if metric == "hessian" else block
        salient, sparse = find_masks(scores, ordinary_order)
        whole = salient.expand_as(block)
        fit = (
            binarize_masked(block, whole, 2, sign)
            + binarize_masked(block, ~whole & ~sparse, 1, sign)
            + binarize_masked(block, ~whole & sparse, 1, sign)
        )
        quantized[:, start:end] = fit
        masks.append((salient, sparse))
        error = torch.zeros_like(block)
        for j in range(end - start):
            error[:, j] = (block[:, j] - fit[:, j]) / corner[j, j]
        weight[:, end:] -= error @ upper[start:end, end:]
    return quantized, masks


def dual_bell_losses(weight, scales):
    """DTNP and DTMD of one block at `scales`."""
    value = weight * scales
    mean = value.mean(dim=1, keepdim=True)
    spread = (value - mean).abs().mean(dim=1, keepdim=True)
    high, low = mean + spread, mean - spread
    to_high, to_low = (value - high).abs(), (value - low).abs()
    target = torch.where(to_high < to_low, high, low)
    dtnp = 100 * ((value - target) ** 2 / target**2).mean()
    dtmd = torch.minimum(to_high, to_low).mean()
    return dtnp, dtmd


def learn_column_scales(weights, act_absmax, epsilon=0.85, steps=200, block_size=128, learning_rate=0.01):
    learned = []
    for weight in weights:
        start = (act_absmax**epsilon / weight.abs().amax(dim=0) ** (1 - epsilon)).clamp_min(1e-5)
        parts = []
        for begin in range(0, weight.shape[1], block_size):
            block = weight[:, begin : begin + block_size]
            scales = start[begin : begin + block_size].clone().requires_grad_()
            optimizer = torch.optim.SGD([scales], lr=learning_rate)
            best_loss, best, previous = float("inf"), scales.detach().clone(), float("inf")
            for _ in range(steps):
                optimizer.zero_grad()
                dtnp, dtmd = dual_bell_losses(block, scales)
                if dtmd.item() > previous:
                    break
                dtnp.backward()
                optimizer.step()
                if dtnp.item() < best_loss:
                    best_loss, best = dtnp.item(), scales.detach().clone()
                previous = dtmd.item()
            parts.append(best)
        learned.append(torch.cat(parts))
    stacked = torch.stack(learned)
    return stacked.gather(0, stacked.abs().argmax(dim=0, keepdim=True)).squeeze(0)
