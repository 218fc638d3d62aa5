// Label map -> GeoJSON in pixels: each 4-connected region as its outer ring, then its holes.
//
// Pixels without data, whose id no class has, are in no polygon. The result equals that of the
// server and of `useg predict`.

export function toGeojson({ width, height, ids }, classes) {
  const regions = labelRegions(ids, width, height);
  const names = new Map(classes.map(({ id, name }) => [id, name]));
  const features = [];
  for (let k = 0; k < ids.length; k++) {
    if (!names.has(ids[k])) continue;
    const feature = (features[regions[k]] ??= createFeature(names.get(ids[k]), ids[k]));
    feature.properties.pixels++;
  }
  for (const { region, ring } of traceRings(regions, width, height)) {
    features[region]?.geometry.coordinates.push(ring);
  }
  return { type: "FeatureCollection", features: features.filter(Boolean) };
}

function createFeature(name, id) {
  return {
    type: "Feature",
    properties: { class: name, id, pixels: 0 },
    geometry: { type: "Polygon", coordinates: [] },
  };
}

/** Numbers the 4-connected regions of equal ids, in the order of their first pixels. */
function labelRegions(ids, width, height) {
  const parent = new Int32Array(width * height);
  const root = (k) => {
    while (parent[k] !== k) k = parent[k] = parent[parent[k]];
    return k;
  };
  for (let k = 0; k < ids.length; k++) {
    const left = k % width && ids[k - 1] === ids[k] ? root(k - 1) : k;
    const up = k >= width && ids[k - width] === ids[k] ? root(k - width) : k;
    parent[k] = parent[left] = parent[up] = Math.min(left, up);
  }
  let count = 0;
  const regions = new Int32Array(width * height);
  for (let k = 0; k < ids.length; k++) regions[k] = parent[k] === k ? count++ : regions[root(k)];
  return regions;
}

// Right, down, left, up.
const STEPS = [
  [1, 0],
  [0, 1],
  [-1, 0],
  [0, -1],
];

// For each direction, the pixel ahead of a corner on the right-hand side. The pixel ahead on the
// left-hand side is that of the previous direction.
const PIXEL_AHEAD = [
  [0, 0],
  [-1, 0],
  [-1, -1],
  [0, -1],
];

/**
 * Yields the rings of all regions, in the order of their first edges.
 *
 * A region lies to the right of its rings. A ring lists its corners, the first one again at the
 * end.
 */
function* traceRings(regions, width, height) {
  const isOutside = (x, y) => x < 0 || y < 0 || x >= width || y >= height;
  const regionAt = (x, y) => (isOutside(x, y) ? -1 : regions[y * width + x]);
  // Pixels whose upper edge belongs to a ring already.
  const traced = new Uint8Array(width * height);
  for (let k = 0; k < regions.length; k++) {
    const region = regions[k];
    if (traced[k] || (k >= width && regions[k - width] === region)) continue;
    const isAhead = (x, y, [dx, dy]) => regionAt(x + dx, y + dy) === region;
    let [x, y, direction] = [k % width, Math.floor(k / width), 0];
    const [firstX, firstY] = [x, y];
    const ring = [[x, y]];
    do {
      if (direction === 0) traced[y * width + x] = 1;
      x += STEPS[direction][0];
      y += STEPS[direction][1];
      const before = direction;
      const left = (direction + 3) % 4;
      if (isAhead(x, y, PIXEL_AHEAD[left])) direction = left;
      else if (!isAhead(x, y, PIXEL_AHEAD[direction])) direction = (direction + 1) % 4;
      if (direction !== before) ring.push([x, y]);
    } while (x !== firstX || y !== firstY || direction !== 0);
    yield { region, ring };
  }
}
