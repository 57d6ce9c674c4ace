// Painting on a frame: a plain 2D canvas, which needs no graphics card. Every `.painter` that appears in the page is set up once.
// What is painted goes, as a PNG with alpha, into the text box of id `painted`, which the server reads.
(() => {
  const COLOUR = "rgb(34, 211, 238)";

  function send(text) {
    const box = document.querySelector("#painted textarea, #painted input");
    if (!box || box.value === text) return;
    const prototype = box instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(prototype.prototype, "value").set.call(box, text);
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function setUp(root) {
    root.dataset.ready = "1";
    const canvas = root.querySelector("canvas");
    const tools = canvas.getContext("2d", { willReadFrequently: true });
    const size = root.querySelector("input[type=range]");
    const buttons = Object.fromEntries([...root.querySelectorAll("button")].map((one) => [one.dataset.tool, one]));
    const undo = [];
    let erases = false;
    let last = null;
    let painted = false;

    const keep = () => {
      undo.push(tools.getImageData(0, 0, canvas.width, canvas.height));
      if (undo.length > 20) undo.shift();
    };
    const report = () => {
      painted = tools.getImageData(0, 0, canvas.width, canvas.height).data.some((value, place) => place % 4 === 3 && value > 0);
      send(painted ? canvas.toDataURL("image/png") : "");
    };
    const choose = (eraser) => {
      erases = eraser;
      buttons.brush.setAttribute("aria-pressed", String(!eraser));
      buttons.eraser.setAttribute("aria-pressed", String(eraser));
    };
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
    };
    const stroke = (from, to) => {
      tools.globalCompositeOperation = erases ? "destination-out" : "source-over";
      tools.strokeStyle = COLOUR;
      tools.lineWidth = Number(size.value);
      tools.lineCap = tools.lineJoin = "round";
      tools.beginPath();
      tools.moveTo(...from);
      tools.lineTo(to[0] + 0.01, to[1]);
      tools.stroke();
    };

    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 0) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      keep();
      last = place(event);
      stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const one of event.getCoalescedEvents?.() ?? [event]) {
        const next = place(one);
        stroke(last, next);
        last = next;
      }
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        if (!last) return;
        last = null;
        report();
      });
    }
    buttons.brush.addEventListener("click", () => choose(false));
    buttons.eraser.addEventListener("click", () => choose(true));
    buttons.undo.addEventListener("click", () => {
      if (!undo.length) return;
      tools.putImageData(undo.pop(), 0, 0);
      report();
    });
    buttons.clear.addEventListener("click", () => {
      keep();
      tools.clearRect(0, 0, canvas.width, canvas.height);
      report();
    });
    send(""); // what was painted on an earlier frame is gone
  }

  new MutationObserver(() => {
    for (const root of document.querySelectorAll(".painter:not([data-ready])")) setUp(root);
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
