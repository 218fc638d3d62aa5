// Label map -> GeoJSON in pixels, as useg.inference.polygons makes it: every 4-connected region, its outer ring, then its holes.

export function toGeojson({ width, height, ids }, classes) {
  const numbers = regionNumbers(ids, width, height);
  const names = new Map(classes.map(({ id, name }) => [id, name]));
  const features = [];
  for (let k = 0; k < ids.length; k++) {
    const region = (features[numbers[k]] ??= feature(names.get(ids[k]), ids[k]));
    region.properties.pixels++;
  }
  for (const { number, ring } of rings(numbers, width, height)) features[number].geometry.coordinates.push(ring);
  return { type: "FeatureCollection", features };
}

function feature(name, id) {
  return { type: "Feature", properties: { class: name, id, pixels: 0 }, geometry: { type: "Polygon", coordinates: [] } };
}

/** Numbers the 4-connected regions of equal ids in the order of their first pixels. */
function regionNumbers(ids, width, height) {
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
  const numbers = new Int32Array(width * height);
  for (let k = 0; k < ids.length; k++) numbers[k] = parent[k] === k ? count++ : numbers[root(k)];
  return numbers;
}

const STEPS = [[1, 0], [0, 1], [-1, 0], [0, -1]]; // right, down, left, up
const AHEAD = [[0, 0], [-1, 0], [-1, -1], [0, -1]]; // the pixel ahead to the right of a corner, in each direction; to the left: that of the direction before

/** Yields rings with their region to the right, in the order of their first edges; corners only, the first once more at the end. */
function* rings(numbers, width, height) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? -1 : numbers[y * width + x]);
  const followed = new Uint8Array(width * height); // pixels whose upper edge has been
  for (let k = 0; k < numbers.length; k++) {
    const number = numbers[k];
    if (followed[k] || (k >= width && numbers[k - width] === number)) continue;
    let [x, y, direction] = [k % width, Math.floor(k / width), 0];
    const [firstX, firstY] = [x, y];
    const ring = [[x, y]];
    do {
      if (direction === 0) followed[y * width + x] = 1;
      x += STEPS[direction][0];
      y += STEPS[direction][1];
      const before = direction;
      const left = (direction + 3) % 4;
      if (at(x + AHEAD[left][0], y + AHEAD[left][1]) === number) direction = left;
      else if (at(x + AHEAD[direction][0], y + AHEAD[direction][1]) !== number) direction = (direction + 1) % 4;
      if (direction !== before) ring.push([x, y]);
    } while (x !== firstX || y !== firstY || direction !== 0);
    yield { number, ring };
  }
}
