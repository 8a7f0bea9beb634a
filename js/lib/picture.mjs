// A picture of the server in a panel.
import { make } from "./panel.mjs";

/** An image that opens in a page of its own when it is clicked. */
export function makePicture(address, alt) {
  const picture = make("img", { src: address, alt, draggable: false });
  picture.addEventListener("click", () => window.open(picture.src, "_blank", "noopener"));
  return picture;
}
