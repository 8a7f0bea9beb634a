// A picture of the server in a panel.
import { make } from "./panel.mjs";

const FRAME = "position:fixed;inset:0;z-index:10000;display:flex;align-items:center;justify-content:center;"
  + "background:#000c;cursor:zoom-out";
// Small pictures, such as the demo base's, are enlarged to what the window has room for.
const INSIDE = "width:92vw;height:92vh;object-fit:contain;image-rendering:auto";

/** An image that is shown large above the page when it is clicked; a click or Escape closes it. */
export function makePicture(address, alt) {
  const picture = make("img", { src: address, alt, draggable: false, tabIndex: 0 });
  picture.setAttribute("role", "button");
  picture.addEventListener("click", () => enlarge(picture));
  picture.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    enlarge(picture);
  });
  return picture;
}

function enlarge(picture) {
  const image = make("img", { src: picture.src, alt: picture.alt });
  image.style.cssText = INSIDE;
  const frame = make("div", { className: "subjectbooth-large", tabIndex: -1 }, image);
  frame.style.cssText = FRAME;
  frame.setAttribute("role", "dialog");
  frame.setAttribute("aria-modal", "true");
  frame.setAttribute("aria-label", picture.alt);
  const close = () => {
    frame.remove();
    picture.focus?.({ preventScroll: true });
  };
  frame.addEventListener("click", close);
  frame.addEventListener("keydown", (event) => {
    event.stopPropagation(); // not to the editor, which has keys of its own
    if (event.key === "Escape") close();
  });
  document.body.append(frame);
  frame.focus();
}
