// The page of the demo. Whatever others wrote reaches it as text nodes alone; a search lives in the address after #.
const L = window.L;
const $ = (selector) => document.querySelector(selector);
const form = $("#ask"), list = $("ol"), why = $("#why");
const FIELDS = ["q", "classes", "since", "until", "where", "bbox"];
const STEPS = [30, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001];

let about, map, drawn, frame; // the index, the Leaflet map, its layers of answers, the rectangle of the box
let hits = [], k, like = "", open = "", asking; // answers, how many, the tile they are like, the open one, a request
let view = ""; // lat,lng,zoom of the map

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** JSON from the server; what it refuses becomes an error with its words. */
async function ask(url, options) {
  const answer = await fetch(url, options);
  const content = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

// The address: what was asked and what is looked at.

function address() {
  const given = FIELDS.map((name) => [name, form[name].value.trim()]);
  const rest = [["like", like], ["k", k === about.shown ? "" : k], ["at", view], ["open", open]];
  return new URLSearchParams([...given, ...rest].filter(([, value]) => value !== ""));
}

function remember({ isNew = false } = {}) {
  history[isNew ? "pushState" : "replaceState"](null, "", `#${address()}`);
}

/** Shows what the address says. */
async function restore() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) form[name].value = asked.get(name) ?? "";
  like = asked.get("like") ?? "";
  k = Number(asked.get("k")) || about.shown;
  $("#filters").open = FIELDS.slice(1, -1).some((name) => form[name].value);
  showBox();
  const [lat, lng, zoom] = (asked.get("at") ?? "").split(",").map(Number);
  const isPlaced = Number.isFinite(lat + lng + zoom);
  if (map && isPlaced) map.setView([lat, lng], zoom, { animate: false });
  else showAll();
  const row = asked.get("open");
  await search({ fit: !isPlaced });
  const number = hits.findIndex((hit) => String(hit.row) === row);
  if (number >= 0) await select(number);
}

// Searching.

function greeting() {
  return `${about.images.toLocaleString("en")} images. Type a sentence or choose a picture.`;
}

/** Asks for what the form says; `fit` moves the map to the answers, or to the box. */
async function search({ isNew = false, fit = false } = {}) {
  close({ isQuiet: true });
  const picture = $("#picture").files[0];
  hits = [];
  if (isNew) remember({ isNew });
  let said = greeting();
  if (form.q.value.trim() || picture || like) {
    asking?.abort();
    const mine = (asking = new AbortController());
    $("#status").textContent = "Searching…";
    const asked = address();
    asked.set("k", k);
    try {
      hits = await ask(`search?${asked}`, { method: "POST", body: picture, signal: mine.signal });
      said = hits.length ? `${hits.length} answers` : "Nothing found.";
    } catch (error) {
      said = error.message;
    }
    if (mine.signal.aborted) return;
  }
  $("#status").textContent = said;
  show(fit);
}

/** Yellow for the lowest score of the answers over red to purple for the highest. */
function colour(hit) {
  const [low, high] = [Math.min(...hits.map((h) => h.score)), Math.max(...hits.map((h) => h.score))];
  const share = high > low ? (hit.score - low) / (high - low) : 1;
  return `hsl(${(412 - 82 * share) % 360} ${92 - 7 * share}% ${50 - 14 * share}%)`;
}

function show(fit) {
  list.replaceChildren(...hits.map(item));
  $("#scale").hidden = hits.length < 2;
  $("#more").hidden = hits.length < k || k >= 384;
  if (!map) return;
  drawn.clearLayers();
  for (const [number, hit] of [...hits.entries()].reverse()) if (hit.place) drawn.addLayer(footprint(number, hit));
  const box = frame?.getBounds() ?? drawn.getLayers().reduce((all, one) => all.extend(one.getBounds()), L.latLngBounds([]));
  if (fit && box.isValid()) map.fitBounds(box.pad(0.1), { maxZoom: 17, animate: false });
  size();
}

function item(hit, number) {
  const scales = hit.match.map((value) => value.toFixed(1)).join(" ");
  const button = make("button", { type: "button", onclick: () => select(number) },
    make("img", { src: `tile/${hit.row}`, alt: hit.captions[0] ?? hit.id, loading: "lazy" }),
    make("span", {}, `${number + 1}. ${hit.score.toFixed(2)}`),
    make("span", {}, scales),
    make("span", {}, [hit.class, hit.date].filter(Boolean).join(", ") || hit.id));
  button.style.borderColor = colour(hit);
  return make("li", {}, button);
}

// The map.

function footprint(number, hit) {
  const outline = L.geoJSON(hit.place, { style: { color: colour(hit), weight: 3, fillOpacity: 0.05 } });
  const layer = L.featureGroup([outline]);
  if (hit.place.type === "Polygon") {
    layer.addLayer(L.imageOverlay(`tile/${hit.row}`, outline.getBounds(), { pane: "tiles" }));
  }
  // Where the footprint is too small to be seen, a dot stands for it.
  const dot = L.circleMarker(outline.getBounds().getCenter(), { radius: 6, color: "#fff", weight: 1, fillColor: colour(hit) });
  return Object.assign(layer.addLayer(dot), { outline, dot, number }).on("click", () => select(number));
}

function size() {
  for (const { outline, dot } of drawn.getLayers()) {
    const box = outline.getBounds();
    const [a, b] = [map.latLngToLayerPoint(box.getNorthWest()), map.latLngToLayerPoint(box.getSouthEast())];
    dot.setStyle({ fillOpacity: b.distanceTo(a) < 16 ? 1 : 0, opacity: b.distanceTo(a) < 16 ? 1 : 0 });
  }
}

function showAll() {
  if (map) map.fitBounds(L.latLngBounds(about.boxes.flatMap(([w, s, e, n]) => [[s, w], [n, e]])).pad(0.05), { animate: false });
}

function startMap() {
  map = L.map("map", { minZoom: 1, maxZoom: 21, worldCopyJump: true });
  map.attributionControl.setPrefix("Leaflet");
  L.control.scale({ imperial: false }).addTo(map);
  for (const [name, zIndex] of [["lines", 250], ["coverage", 300], ["tiles", 350]]) {
    Object.assign(map.createPane(name).style, { zIndex, pointerEvents: "none" });
  }
  if (about.basemap) {
    const credit = make("i", {}, about.credit || new URL(about.basemap.replace("{s}.", "")).host).innerHTML; // escaped
    L.tileLayer(about.basemap, { attribution: credit, maxZoom: 21, maxNativeZoom: 19 }).addTo(map);
  }
  showAll();
  const grey = { renderer: L.canvas({ pane: "coverage" }), color: "#8d9aa0", weight: 1, fillOpacity: 0.3, interactive: false };
  for (const [w, s, e, n] of about.boxes) L.rectangle([[s, w], [n, e]], grey).addTo(map);
  drawn = L.featureGroup().addTo(map);
  const lines = L.layerGroup().addTo(map);
  graticule(lines);
  map.on("zoomend", size).on("moveend", () => graticule(lines)).on("moveend", keepView);
  new ResizeObserver(() => map.invalidateSize()).observe($("#map"));
}

function keepView() {
  const { lat, lng } = map.getCenter();
  view = `${lat.toFixed(5)},${lng.toFixed(5)},${map.getZoom()}`;
  remember();
}

/** Lines of longitude and latitude, at least four across the view. */
function graticule(lines) {
  lines.clearLayers();
  const seen = map.getBounds();
  const [west, south, east, north] = [seen.getWest(), seen.getSouth(), seen.getEast(), seen.getNorth()];
  const step = STEPS.find((degrees) => (east - west) / degrees >= 4) ?? STEPS.at(-1);
  const style = { pane: "lines", color: "#b9c6cb", weight: 1, interactive: false };
  const label = (at, value, iconAnchor) => {
    const shown = Number((((value + 540) % 360) - 180).toFixed(4));
    const icon = L.divIcon({ className: "degrees", html: make("span", {}, `${shown}°`), iconSize: null, iconAnchor });
    L.marker(at, { pane: "lines", icon, interactive: false, keyboard: false }).addTo(lines);
  };
  for (let x = Math.ceil(west / step); x * step <= east; x++) {
    L.polyline([[south, x * step], [north, x * step]], style).addTo(lines);
    label([north, x * step], x * step, [-3, 0]);
  }
  for (let y = Math.ceil(Math.max(south, -85) / step); y * step <= Math.min(north, 85); y++) {
    L.polyline([[y * step, west], [y * step, east]], style).addTo(lines);
    label([y * step, east], y * step, [52, 15]);
  }
}

// The box.

function setBox(box) {
  const wide = box.getEast() - box.getWest() >= 360;
  const [west, east] = wide ? [-180, 180] : [box.getWest(), box.getEast()].map((x) => L.Util.wrapNum(x, [-180, 180], true));
  form.bbox.value = [west, Math.max(box.getSouth(), -90), east, Math.min(box.getNorth(), 90)].map((x) => Number(x.toFixed(6))).join(", ");
  showBox();
  search({ isNew: true });
}

function showBox() {
  frame?.remove();
  frame = null;
  const [west, south, east, north] = form.bbox.value.split(",").map(Number);
  $("#drop").hidden = !form.bbox.value;
  if (!map || !form.bbox.value || !Number.isFinite(west + south + east + north)) return;
  const corners = [[south, west], [north, east < west ? east + 360 : east]];
  frame = L.rectangle(corners, { color: "#1766c2", weight: 2, dashArray: "6 4", fill: false, interactive: false }).addTo(map);
}

function drawing(isOn) {
  $("#veil").hidden = !isOn;
  $("#draw").setAttribute("aria-pressed", isOn);
}

function startDrawing() {
  const veil = $("#veil");
  let from, sketch;
  veil.onpointerdown = (event) => {
    veil.setPointerCapture(event.pointerId);
    from = map.mouseEventToLatLng(event);
    sketch = L.rectangle([from, from], { color: "#1766c2", weight: 2, interactive: false }).addTo(map);
  };
  veil.onpointermove = (event) => from && sketch.setBounds([from, map.mouseEventToLatLng(event)]);
  veil.onpointerup = veil.onpointercancel = (event) => {
    if (!from) return;
    const box = sketch.getBounds();
    sketch.remove();
    from = null;
    drawing(false);
    if (event.type === "pointerup" && !box.getNorthEast().equals(box.getSouthWest())) setBox(box);
  };
}

// One answer: what is known of it and why it was found.

async function select(number) {
  const hit = hits[number];
  open = String(hit.row);
  mark();
  remember();
  const heading = make("h2", { id: "name", tabIndex: -1 }, `${number + 1}. ${hit.id}`);
  const facts = { score: hit.score.toFixed(3), cosine: hit.cosine.toFixed(3), scales: hit.match.map((x) => x.toFixed(2)).join(" "), class: hit.class, date: hit.date };
  const reasons = make("div");
  const known = Object.entries(facts).filter(([, value]) => value);
  why.replaceChildren(
    make("header", {}, heading, make("button", { type: "button", onclick: () => close() }, "Close")),
    make("div", { className: "known" },
      make("img", { src: `tile/${hit.row}`, alt: "" }),
      make("dl", {}, ...known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]))),
    make("button", { type: "button", onclick: () => findLike(hit.row) }, "Find tiles like this"),
    reasons,
    make("ul", {}, ...hit.captions.map((caption) => make("li", {}, caption))));
  why.hidden = false;
  why.scrollTop = 0;
  heading.focus();
  try {
    const scales = await ask(`reasons?${new URLSearchParams({ row: hit.row, q: form.q.value })}`);
    const most = Math.max(...scales.flatMap((scale) => scale.parts.map(([, value]) => Math.abs(value))));
    reasons.append(...scales.map((scale) => reason(scale, most)));
  } catch (error) {
    reasons.append(make("p", {}, error.message));
  }
}

/** Where a scale looked, and what each word gave. */
function reason({ name, logit, parts, picture }, most) {
  const rows = parts.map(([word, value]) => {
    const bar = make("i", { className: value < 0 ? "against" : "" });
    const width = (50 * Math.abs(value)) / most;
    Object.assign(bar.style, { width: `${width}%`, left: `${value < 0 ? 50 - width : 50}%` });
    return make("tr", {}, make("th", { scope: "row" }, word), make("td", {}, bar), make("td", {}, value.toFixed(2)));
  });
  const seen = make("img", { src: picture, alt: `${name}: bright is where it looked` });
  return make("figure", {}, make("figcaption", {}, `${name}: ${logit.toFixed(2)}`), seen, make("table", {}, ...rows));
}

function mark() {
  for (const [number, hit] of hits.entries()) {
    const button = list.children[number].firstChild;
    if (String(hit.row) === open) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  for (const layer of drawn?.getLayers() ?? []) {
    const isOpen = String(hits[layer.number].row) === open;
    layer.outline.setStyle({ weight: isOpen ? 6 : 3 });
    if (!isOpen) continue;
    layer.outline.bringToFront();
    if (!map.getBounds().intersects(layer.getBounds())) map.panTo(layer.getBounds().getCenter(), { animate: false });
  }
}

function close({ isQuiet = false } = {}) {
  const number = hits.findIndex((hit) => String(hit.row) === open);
  [open, why.hidden] = ["", true];
  if (isQuiet) return;
  mark();
  remember();
  list.children[number]?.firstChild.focus();
}

function findLike(row) {
  removePicture();
  form.q.value = "";
  like = String(row);
  search({ isNew: true, fit: true });
}

function removePicture() {
  $("#picture").value = "";
  $("#picture").dispatchEvent(new Event("change"));
}

async function start() {
  about = await ask("index");
  k = about.shown;
  $("#classes").append(...about.classes.map((value) => make("option", { value })));
  $("#columns").textContent = `columns: ${about.columns.join(", ")}`;
  document.body.classList.toggle("placeless", !about.boxes.length);
  if (about.boxes.length) startMap();
  startDrawing();
  $("#picture").onchange = (event) => {
    const [file] = event.target.files;
    $("#example").hidden = !file;
    URL.revokeObjectURL($("#example img").src);
    if (file) $("#example img").src = URL.createObjectURL(file);
  };
  $("#example button").onclick = removePicture;
  $("#draw").onclick = () => drawing($("#veil").hidden);
  $("#take").onclick = () => setBox(map.getBounds());
  $("#drop").onclick = () => {
    form.bbox.value = "";
    showBox();
    search({ isNew: true, fit: true });
  };
  $("#more").onclick = () => {
    k *= 2;
    search({ isNew: true, fit: true });
  };
  list.onkeydown = (event) => {
    const next = { ArrowDown: "nextSibling", ArrowRight: "nextSibling", ArrowUp: "previousSibling", ArrowLeft: "previousSibling" }[event.key];
    const to = next && event.target.closest("li")[next];
    if (to) to.firstChild.focus();
    if (next) event.preventDefault();
  };
  document.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    if (!$("#veil").hidden) drawing(false);
    else if (!why.hidden) close();
  };
  window.onpopstate = restore;
  if (location.hash.length > 1) await restore();
  else $("#status").textContent = greeting(); // what somebody is typing already stays
}

const started = start().catch((error) => ($("#status").textContent = error.message));
form.onsubmit = async (event) => {
  event.preventDefault();
  await started;
  [like, k] = ["", about.shown];
  showBox();
  search({ isNew: true, fit: true });
};
