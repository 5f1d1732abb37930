(() => {
  // A concept's card is on the page already; the panel shows a copy of it over the half of the window without its node.
  for (const figure of document.querySelectorAll("figure.graph")) {
    const svg = figure.querySelector("svg");
    const panel = figure.querySelector(".node-panel");
    let pinned = null;
    const cardOf = (node) => document.getElementById((node?.getAttribute("href") ?? "#").slice(1));
    const show = (node) => {
      const card = cardOf(node);
      svg.classList.toggle("chosen", node !== null);
      for (const edge of svg.querySelectorAll(".edge")) {
        edge.classList.toggle("lit", [edge.dataset.source, edge.dataset.target].includes(node?.dataset.node));
      }
      panel.hidden = !card;
      if (!card) return;
      const copy = card.cloneNode(true);
      copy.removeAttribute("id");
      copy.querySelectorAll("img").forEach((image) => { image.loading = "eager"; });
      panel.lastElementChild.replaceChildren(copy);
      const box = node.getBoundingClientRect();
      const above = (box.top + box.bottom) / 2 > innerHeight / 2;
      panel.classList.toggle("above", above);
      panel.classList.toggle("below", !above);
    };
    const pin = (node) => {
      pinned?.classList.remove("pinned");
      pinned?.removeAttribute("aria-current");
      pinned = node;
      pinned?.classList.add("pinned");
      pinned?.setAttribute("aria-current", "true");
      panel.classList.toggle("kept", pinned !== null);
      show(pinned);
    };
    for (const node of svg.querySelectorAll(".node")) {
      for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => show(node));
      for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => show(pinned));
      node.addEventListener("click", (event) => { event.preventDefault(); pin(node === pinned ? null : node); });
      node.addEventListener("keydown", (event) => {
        const chosen = event.key === "Enter" || event.key === " ";
        if (chosen && !node.hasAttribute("href")) { event.preventDefault(); pin(node === pinned ? null : node); }
      });
    }
    panel.firstElementChild.addEventListener("click", () => { const node = pinned; pin(null); node?.focus(); show(null); });
    addEventListener("keydown", (event) => { if (event.key === "Escape" && pinned) pin(null); });
  }
})();
