"use strict";

const PAUSE = 60; // milliseconds between two questions while the pointer moves
const PEN = 0.085; // width of a stroke, as a share of the paper's: what the pen of MNIST's writers looks like
const LAYERS = [["picture", 1, 32], ["layer1", 6, 14], ["layer2", 16, 5]];

const byId = (id) => document.getElementById(id);
const paper = byId("drawing");
const strokes = []; // lists of points, in shares of the paper's width
let about = null;
let answer = null;
let drawing = null; // the stroke under the pointer, and which pointer that is

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

/* A row of a bar chart; what is returned sets its texts and its length. */
function addBar(parent, kind = "") {
  const [label, track, value] = [make("span", ""), make("span", "track"), make("span", "")];
  const fill = track.appendChild(make("div", `fill ${kind}`));
  parent.append(label, track, value);
  return (text, share, number) => {
    label.textContent = text;
    fill.style.width = `${100 * share}%`;
    value.textContent = number;
  };
}

/* --- the drawing ------------------------------------------------------------------------------------------------- */

function drawStrokes() {
  const pen = paper.getContext("2d");
  const size = paper.width;
  pen.clearRect(0, 0, size, size);
  pen.lineWidth = PEN * size;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = getComputedStyle(paper).color;
  for (const points of strokes) {
    pen.beginPath();
    // Of the first point, a line to itself: a dot where there is no second.
    for (const [x, y] of [points[0], ...points]) pen.lineTo(x * size, y * size);
    pen.stroke();
  }
}

function changed() {
  drawStrokes();
  const empty = !strokes.length;
  byId("hint").hidden = !empty;
  byId("undo").disabled = byId("clear").disabled = empty;
  if (empty) show(null);
  else ask();
}

/* How much ink is on each pixel, in the size that the server wants. */
function inkBytes() {
  const small = new OffscreenCanvas(about.side, about.side);
  const pen = small.getContext("2d", { willReadFrequently: true });
  pen.imageSmoothingQuality = "high";
  pen.drawImage(paper, 0, 0, about.side, about.side);
  return pen.getImageData(0, 0, about.side, about.side).data.filter((_, n) => n % 4 === 3);
}

function addPoints(event) {
  const { left, top, width } = paper.getBoundingClientRect();
  const seen = event.getCoalescedEvents?.() ?? [];
  for (const { clientX, clientY } of seen.length ? seen : [event]) {
    drawing.points.push([(clientX - left) / width, (clientY - top) / width]);
  }
  changed();
}

paper.addEventListener("pointerdown", (event) => {
  if (drawing || event.button !== 0) return; // a second finger, or another button
  event.preventDefault();
  paper.setPointerCapture(event.pointerId);
  drawing = { points: [], pointer: event.pointerId };
  strokes.push(drawing.points);
  addPoints(event);
});
paper.addEventListener("pointermove", (event) => {
  if (drawing?.pointer === event.pointerId) addPoints(event);
});
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  paper.addEventListener(end, (event) => {
    if (drawing?.pointer === event.pointerId) drawing = null;
  });
}

function undo() {
  drawing = null;
  strokes.pop();
  changed();
}

function clear() {
  drawing = null;
  strokes.length = 0;
  changed();
}

byId("undo").addEventListener("click", undo);
byId("clear").addEventListener("click", clear);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") clear();
  else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
});

/* --- the question: one at a time, and always about the newest drawing --------------------------------------------- */

let asking = false;
let askAgain = false;

async function ask() {
  askAgain = true;
  if (asking || !about) return;
  asking = true;
  while (askAgain) {
    askAgain = false;
    try {
      const reply = await fetch("look", {
        method: "POST",
        headers: { "Content-Type": "application/octet-stream" },
        body: inkBytes(),
      });
      if (!reply.ok) throw new Error(`the server says: ${await reply.text()}`);
      const found = await reply.json();
      if (strokes.length) show(found);
    } catch (error) {
      show(null, error instanceof TypeError ? "No answer: is lenet-ext demo still running?" : error.message);
    }
    await new Promise((done) => setTimeout(done, PAUSE));
  }
  asking = false;
}

/* --- the answer --------------------------------------------------------------------------------------------------- */

const classBars = [];
const timeBars = [addBar(byId("times")), addBar(byId("times"), "stock")];
const maps = LAYERS.map(([id, count, size]) =>
  Array.from({ length: count }, () => {
    const canvas = byId(id).appendChild(document.createElement("canvas"));
    canvas.width = canvas.height = size;
    return canvas;
  }),
);

/* Values from 0 to 255, as much of the canvas's color as they say. */
function paint(canvas, values) {
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(canvas.width, canvas.height);
  values.forEach((value, n) => (image.data[4 * n + 3] = value));
  pen.putImageData(image, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = getComputedStyle(canvas).color;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "source-over";
}

const percent = (probability) => `${(100 * probability).toFixed(1)}%`;
const microseconds = (time) => `${time.toFixed(time < 100 ? 1 : 0)} \u00b5s`;

function show(found, message = "Nothing is drawn yet") {
  answer = found;
  document.body.classList.toggle("empty", !found);
  const classes = found?.classes ?? about?.labels.map((label) => ({ label })) ?? [];
  classes.forEach(({ label, probability }, n) => {
    classBars[n](label, probability ?? 0, probability === undefined ? "" : percent(probability));
  });
  byId("best").textContent = found?.best.label ?? "?";
  byId("sure").textContent = found ? percent(found.best.probability) + (found.sure ? "" : ", unsure") : message;
  byId("sure").classList.toggle("unsure", found ? !found.sure : false);
  showTimes(found?.times);
  maps.forEach((canvases, layer) => {
    canvases.forEach((canvas, n) => {
      const pixels = canvas.width * canvas.height;
      paint(canvas, found?.layers[layer].values.slice(n * pixels, (n + 1) * pixels) ?? []);
    });
  });
}

function showTimes(times) {
  const slower = Math.max(times?.fused_us, times?.stock_us);
  timeBars[0]("fused", times ? times.fused_us / slower : 0, times ? microseconds(times.fused_us) : "");
  timeBars[1]("stock", times ? times.stock_us / slower : 0, times ? microseconds(times.stock_us) : "");
  if (!times) {
    byId("ratio").textContent = "Fused and stock PyTorch, in turns, while you draw";
    return;
  }
  const threads = times.threads === 1 ? "one thread" : `${times.threads} threads`;
  const how = `One forward pass, medians of ${times.rounds} turns, ${threads}.`;
  byId("ratio").textContent = `Stock takes ${times.ratio.toFixed(1)} times as long. ${how}`;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawStrokes();
  show(answer);
});

async function start() {
  about = await (await fetch("about")).json();
  about.labels.forEach(() => classBars.push(addBar(byId("classes"))));
  const more = about.classes > about.labels.length ? ` (${about.classes} classes, the most probable are shown)` : "";
  byId("about").textContent = `LeNet trained on ${about.data}${more}, on ${about.machine}`;
  byId("hint").textContent = about.labels.every((label) => /^\d$/.test(label)) ? "Draw a digit" : "Draw here";
  show(null);
  if (strokes.length) ask();
}

start();
