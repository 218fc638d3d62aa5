// Shapes -> rows of pixels. Each function calls span(y, from, to) for columns from..to-1 of row y.

/** A thick line from a to b ([x, y] in pixels) with round ends: what a brush covers. */
export function coverLine([ax, ay], [bx, by], radius, span) {
  const [dx, dy] = [bx - ax, by - ay];
  const length = Math.hypot(dx, dy);
  // From the centre line to the edges.
  const [nx, ny] = length ? [(-dy / length) * radius, (dx / length) * radius] : [0, 0];
  const edges = [
    [ax + nx, ay + ny, bx + nx, by + ny],
    [ax - nx, ay - ny, bx - nx, by - ny],
  ];
  const top = Math.floor(Math.min(ay, by) - radius);
  const bottom = Math.ceil(Math.max(ay, by) + radius);
  for (let y = top; y <= bottom; y++) {
    const middle = y + 0.5;
    let [from, to] = [Infinity, -Infinity];
    for (const [cx, cy] of [[ax, ay], [bx, by]]) {
      const square = radius * radius - (middle - cy) ** 2;
      if (square < 0) continue;
      from = Math.min(from, cx - Math.sqrt(square));
      to = Math.max(to, cx + Math.sqrt(square));
    }
    for (const [x1, y1, x2, y2] of edges) {
      if (middle < Math.min(y1, y2) || middle > Math.max(y1, y2) || y1 === y2) continue;
      const x = x1 + ((middle - y1) / (y2 - y1)) * (x2 - x1);
      from = Math.min(from, x);
      to = Math.max(to, x);
    }
    // Pixels whose centres are covered.
    if (from <= to) span(y, Math.ceil(from - 0.5), Math.floor(to - 0.5) + 1);
  }
  // A brush smaller than a pixel covers the pixel below it.
  if (radius < 1) {
    for (const [x, y] of [[ax, ay], [bx, by]]) {
      span(Math.floor(y), Math.floor(x), Math.floor(x) + 1);
    }
  }
}

/** The inside of a polygon, by the even-odd rule. */
export function coverPolygon(points, span) {
  const rows = points.map(([, y]) => y);
  for (let y = Math.floor(Math.min(...rows)); y <= Math.max(...rows); y++) {
    const middle = y + 0.5;
    const crossings = [];
    points.forEach(([x1, y1], k) => {
      const [x2, y2] = points[(k + 1) % points.length];
      if (y1 <= middle !== y2 <= middle) {
        crossings.push(x1 + ((middle - y1) / (y2 - y1)) * (x2 - x1));
      }
    });
    crossings.sort((a, b) => a - b);
    for (let k = 0; k + 1 < crossings.length; k += 2) {
      const [from, to] = [Math.ceil(crossings[k] - 0.5), Math.floor(crossings[k + 1] - 0.5) + 1];
      if (from < to) span(y, from, to);
    }
  }
}

/** The 4-connected region around a pixel in which isInside(index) is true. */
export function coverConnected(width, height, [x, y], isInside, span) {
  const seen = new Uint8Array(width * height);
  const waiting = [y * width + x];
  while (waiting.length) {
    const start = waiting.pop();
    if (seen[start] || !isInside(start)) continue;
    const row = Math.floor(start / width);
    let [from, to] = [start, start];
    while (from > row * width && !seen[from - 1] && isInside(from - 1)) from--;
    while (to + 1 < (row + 1) * width && !seen[to + 1] && isInside(to + 1)) to++;
    seen.fill(1, from, to + 1);
    span(row, from - row * width, to + 1 - row * width);
    for (const other of [-width, width]) {
      if (row * width + other < 0 || row + Math.sign(other) >= height) continue;
      for (let k = from + other; k <= to + other; k++) {
        // One start per run.
        const begins = k === from + other || seen[k - 1] || !isInside(k - 1);
        if (begins && !seen[k] && isInside(k)) waiting.push(k);
      }
    }
  }
}
