// How far a picture grows: its frame is dragged by edges and corners. Every `.grower` that appears in the page is set up once.
// The sliders `side-left`, `side-top`, `side-right` and `side-bottom` hold the percentages, and move the frame, too.
(() => {
  const SIDES = ["left", "top", "right", "bottom"];

  const slider = (side) => document.querySelector(`#side-${side} input[type=range]`);
  const percent = (side) => Number(slider(side)?.value ?? 0);

  function set(side, value) {
    const box = slider(side);
    if (!box || Number(box.value) === value) return;
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(box, String(value));
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function release(sides) {
    for (const side of sides) slider(side)?.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }

  // The picture is the middle third of the area, so that each side has room for 100 %.
  function draw(root) {
    const frame = root.querySelector(".grower-frame");
    for (const side of SIDES) frame.style[side] = `${(100 - percent(side)) / 3}%`;
    root.querySelector(".grower-text").textContent = SIDES.map((side) => `${percent(side)} %`).join(" · ");
  }

  function setUp(root) {
    root.dataset.ready = "1";
    const area = root.querySelector(".grower-area");
    for (const handle of root.querySelectorAll("[data-sides]")) {
      const sides = handle.dataset.sides.split(" ");
      let drags = false;
      handle.addEventListener("pointerdown", (event) => {
        if (event.button > 0) return;
        event.preventDefault();
        handle.setPointerCapture(event.pointerId);
        drags = true;
      });
      handle.addEventListener("pointermove", (event) => {
        if (!drags) return;
        const box = area.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width;
        const y = (event.clientY - box.top) / box.height;
        const grown = { left: 1 - 3 * x, right: 3 * x - 2, top: 1 - 3 * y, bottom: 3 * y - 2 };
        for (const side of sides) set(side, Math.round(100 * Math.min(1, Math.max(0, grown[side]))));
        draw(root);
      });
      for (const end of ["pointerup", "pointercancel"]) {
        handle.addEventListener(end, () => {
          if (!drags) return;
          drags = false;
          release(sides);
        });
      }
    }
    draw(root);
  }

  const redraw = () => document.querySelectorAll(".grower[data-ready]").forEach(draw);
  document.addEventListener("input", (event) => {
    if (event.target.closest?.('[id^="side-"]')) setTimeout(redraw);
  });
  new MutationObserver(() => {
    for (const root of document.querySelectorAll(".grower:not([data-ready])")) {
      if (SIDES.every(slider)) setUp(root);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
