// Three planes that scroll, by NiiVue; a picture where the browser has no WebGL 2.
const find = (what) => element.querySelector(what);
const canvas = find("canvas"), still = find(".enn-planes");
const sliders = [...element.querySelectorAll("[data-axis]")];
let facts = {}, mode = null, wish = "brain", nv = null, loading = null, loaded = "", overlay = false;
let drawing = Promise.resolve();

const script = () => new Promise((resolve, reject) => {
  const tag = document.createElement("script");
  tag.src = new URL("brain/niivue-0.69.0.umd.js", document.baseURI);
  tag.onload = resolve;
  tag.onerror = reject;
  document.head.append(tag);
});
const dark = () => document.body.classList.contains("dark");

const start = async () => {
  if (!canvas.getContext("webgl2")) throw new Error("no WebGL 2");
  await script();
  const { Niivue, SLICE_TYPE, SHOW_RENDER } = window.niivue;
  nv = new Niivue({
    backColor: [0.03, 0.04, 0.06, 1],
    crosshairColor: [0.18, 0.83, 0.75, 0.7],
    crosshairWidth: 0.6,
    dragAndDropEnabled: false,
    multiplanarShowRender: SHOW_RENDER?.NEVER ?? 0,
    multiplanarPadPixels: 4,
    isColorbar: false,
    isResizeCanvas: true,
    sliceType: SLICE_TYPE.MULTIPLANAR,
    logLevel: "silent",
    isRadiologicalConvention: false,
  });
  await nv.attachToCanvas(canvas);
  const drawScene = nv.drawScene.bind(nv);
  nv.drawScene = (...args) => { // not while it is hidden, or not yet of its size
    if (Math.min(canvas.offsetWidth, canvas.width, canvas.height) > 40) drawScene(...args);
  };
  nv.onLocationChange = (where) => {
    const frac = where.frac ?? [];
    sliders.forEach((slider, axis) => {
      if (document.activeElement !== slider || !slider.matches(":active")) {
        slider.value = frac[axis] ?? 0.5;
      }
    });
    const [x, y, z] = where.mm ?? [0, 0, 0];
    const at = (value, low, high) => `${Math.abs(value).toFixed(0)} ${value < 0 ? low : high}`;
    find(".enn-where").textContent = mode === "brain"
      ? `MNI: ${at(x, "left", "right")}, ${at(y, "back", "front")}, ${at(z, "down", "up")} (mm)`
      : "";
  };
};

const draw = async () => {
  const address = facts[mode];
  const map = overlay && mode === "brain" ? facts.map : "";
  const key = `${address}|${map}`;
  if (!address || key === loaded) return;
  loaded = key;
  const url = (path) => new URL(path, document.baseURI).href;
  const keep = nv.volumes.length && canvas.dataset.shown === address
    ? [...nv.scene.crosshairPos] : null;
  const volumes = [{ url: url(address), name: "scan.nii.gz", colormap: "gray" }];
  if (map) {
    volumes.push({
      url: url(map), name: "map.nii.gz", colormap: "warm", colormapNegative: "winter",
      cal_min: 0.15 * facts.top, cal_max: Number(facts.top),
      cal_minNeg: -facts.top, cal_maxNeg: -0.15 * facts.top, opacity: 0.7,
    });
  }
  canvas.dataset.ready = "";
  await nv.loadVolumes(volumes);
  if (keep) nv.scene.crosshairPos = keep;
  nv.updateGLVolume();
  canvas.dataset.shown = address;
  canvas.dataset.ready = key;
  nv.createOnLocationChange?.();
};

const update = async () => {
  const box = find(".enn-viewer");
  box.hidden = !(facts.head || facts.brain);
  if (box.hidden) return;
  mode = facts[wish] ? wish : facts.head ? "head" : "brain";
  for (const button of element.querySelectorAll("[data-view]")) {
    button.disabled = !facts[button.dataset.view];
    button.setAttribute("aria-pressed", String(button.dataset.view === mode));
  }
  const explain = find("[data-do='explain']");
  explain.hidden = !facts.brain || !facts.explain;
  explain.disabled = facts.explain === "working";
  explain.setAttribute("aria-pressed", String(overlay && Boolean(facts.map) && mode === "brain"));
  explain.textContent = facts.explain === "working"
    ? "Computing what the answer depends on…" : "Show what the answer depends on";
  const legend = find(".enn-legend");
  legend.hidden = !(overlay && facts.map && mode === "brain");
  legend.textContent = "Orange: the brighter, the older the prediction; blue: the younger. Full colour "
    + `is ${Number(facts.top).toPrecision(2)} years for 10 % more brightness in 1 cm³. This is what `
    + "the model reacts to, which need not be what ages.";
  loading ??= start();
  try {
    await loading;
  } catch {
    // No WebGL 2: the picture tells as much as can be told.
    canvas.hidden = true;
    find(".enn-sliders").hidden = true;
    still.hidden = !facts.planes;
    if (facts.planes) still.src = facts.planes;
    return;
  }
  // One after the other: of two loads at once, the one that ends last would be shown.
  drawing = drawing.then(draw).catch(() => { loaded = ""; }); // the scan was deleted meanwhile
};

element.addEventListener("click", (event) => {
  const view = event.target.closest("[data-view]");
  if (view) { wish = view.dataset.view; update(); }
  if (event.target.closest("[data-do='explain']")) {
    if (!facts.map) { overlay = true; trigger("explain", { scan: Number(facts.scan) }); }
    else overlay = mode === "brain" ? !overlay : true;
    wish = "brain";
    update();
  }
});
element.addEventListener("input", (event) => {
  if (!nv || event.target.dataset.axis === undefined) return;
  nv.scene.crosshairPos = sliders.map((slider) => Number(slider.value));
  nv.drawScene();
  nv.createOnLocationChange?.();
});

window.ennBrain.viewer((next) => {
  if (next.scan !== facts.scan) overlay = false;
  facts = next;
  update();
});
